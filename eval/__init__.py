"""The measuring wing of the gallery: `python -m eval`. It imports hf_gallery, never the reverse."""

import os

# As hf_gallery.spinning does, which says why. It cannot be imported here: hf_gallery brings torch, which reads this.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"
