"""How tests compile on CPUs: most of their time is compiling, which without optimisations takes half as long or less."""

import importlib.metadata

QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
"""Compiler options."""

AS_USERS: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
"""What these options are by default."""

if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions may not know it
    QUICK["xla_cpu_use_fusion_emitters"] = False
    AS_USERS["xla_cpu_use_fusion_emitters"] = True
