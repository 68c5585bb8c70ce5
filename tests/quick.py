"""How tests compile on CPUs: compiling is most of their time, and takes half of it without optimisations."""

import importlib.metadata

QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
"""Compiler options."""

AS_USERS: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
"""What these options are by default."""

if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions may not know them
    QUICK |= {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    AS_USERS |= {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}

HLO_AS_USERS = AS_USERS | {"xla_backend_optimization_level": 0}
"""For what looks at the optimised HLO alone: the same text and buffers, without LLVM's optimisations after it."""


def flags() -> str:
    """QUICK as environment variable XLA_FLAGS has it, for all that a process compiles."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
