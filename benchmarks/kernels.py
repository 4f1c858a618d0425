"""Every operator against cuBLAS dense and the measured ceilings of memory, correctness first.

    python benchmarks/kernels.py shapes=[llama-2-7b] ops=[gathered_ffn] kept=[0.5,0.25,0.1]

Each side of a case is one CUDA graph that walks over several sets of weights, caches and inputs, so
that no cache holds them; the two graphs take turns. An operator that differs from its reference is
reported as wrong, is not timed, and makes the exit status 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

if __name__ == "__main__":  # this file must not answer to Hugging Face's package `kernels`
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    sys.path[:] = [str(here / "support"), *others]


@hydra.main(version_base="1.3", config_path="conf", config_name="kernels")
def main(cfg: DictConfig) -> None:
    """Runs, appends rows to ``out``, prints a table last."""
    from kernel_bench import report  # imports transformers, so after the path is right

    overrides = HydraConfig.get().overrides.task
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    if not report(plain, " ".join(["python benchmarks/kernels.py", *overrides])):
        sys.exit(1)


if __name__ == "__main__":
    main()
