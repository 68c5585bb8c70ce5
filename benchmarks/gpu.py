"""What programs that measure a GPU say where there is none."""

import sys


def no_gpu(program: str, instead: str = "") -> str:
    """The line that says so; `instead` is what the program can do there."""
    line = f"benchmarks.{program} needs an NVIDIA GPU, and none can be used here"
    return f"{line}; {instead}" if instead else line


def require_gpu(program: str, instead: str = "", *, capability: float | None = None) -> None:
    """End the process, with a line and status 1, where jax has no GPU, or one of another compute capability."""
    from mustafar_jax.pallas_kernels import cuda  # brings jax, which some programs must do without

    found = cuda.compute_capability()
    if found is None:
        sys.exit(no_gpu(program, instead))
    if capability not in (None, found):
        sys.exit(f"benchmarks.{program} needs a GPU of compute capability {capability}; this one has {found}")
