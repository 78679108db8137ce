"""The tabs of the page, one file each: ``build(site)`` makes its components inside the caller's Blocks."""
