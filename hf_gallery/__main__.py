"""`python -m hf_gallery`: the command line, see cli.py."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="hf-gallery")
