"""Input images: download, decode, fit, masks; encoding of output images."""
