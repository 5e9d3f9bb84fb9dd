"""The measuring wing of the gallery: `python -m eval`. It imports hf_gallery, never the reverse."""
