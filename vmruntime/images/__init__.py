"""Pulled images: skopeo in, EROFS layers out."""
