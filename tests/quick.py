"""How tests compile on CPUs: compiling is most of their time, and takes half of it without optimisations."""

import importlib.metadata

QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
"""Compiler options."""

AS_USERS: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
"""What these options are by default."""

if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions may not know it
    QUICK["xla_cpu_use_fusion_emitters"] = False
    AS_USERS["xla_cpu_use_fusion_emitters"] = True
