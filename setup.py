from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "hf_gallery" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

evaluation = ["lm-eval>=0.4.13,<0.5", "matplotlib", "scipy>=1.15", "psutil", "jinja2>=3.1"]
testing = [
    "fastapi",
    "openai",
    "uvicorn",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "mypy",
    "beautifulsoup4",
    "peft",
    "trl",
    "sentencepiece",
    "pyyaml",
    "sentence-transformers",
    "setfit",
    "torchao",
    "bitsandbytes",
    "onnxscript",
    "onnxruntime",
    'triton; sys_platform == "linux"',  # torch brings it for CUDA; without a GPU its interpreter tests the kernels
]
documentation = ["mkdocs<2", "mkdocs-material", "mkdocstrings[python]"]  # Material does not go with mkdocs 2

# The lower bounds are the releases that .ci/run tests as the oldest; a release that breaks the gallery gets an upper
# bound here, with the issue that says how.
setup(
    name="hf-gallery",
    version=version,
    description="Long-sequence transformers written from scratch, each a Hugging Face model, and their measure",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hf_gallery", "hf_gallery.*"]),
    package_data={"hf_gallery.looking": ["templates/*.html"]},
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.13",
        "transformers>=5.17,<6",
        "huggingface-hub>=1.5",
        "datasets>=4.0",
        "evaluate>=0.4.3",
        "faiss-cpu>=1.10",
        "accelerate>=1.1",
        "safetensors>=0.8",
        "tokenizers>=0.23.1",
        "numpy>=1.26",
        "pyarrow>=17",
        "typer>=0.15",
        "rich>=13",
        "tqdm>=4.66.3",
        "jinja2>=3.1",
    ],
    entry_points={"console_scripts": ["hf-gallery = hf_gallery.cli:app"]},
    extras_require={"eval": evaluation, "test": evaluation + testing, "docs": documentation},
)
