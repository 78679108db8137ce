"""vlmeff inside other programs; every module here needs its own extra and imports it late."""
