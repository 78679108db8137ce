"""tiny-wan: a trained text-to-video pipeline of Wan's classes, small enough to ship. ``vlmeff.load("tiny-wan")``."""
