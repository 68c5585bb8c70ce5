"""What plain JAX does for the library: everything, anywhere."""

from mustafar_jax.backend import Backend, Operation
from mustafar_jax.backends.xla.attention import attend_dense, attend_packed
from mustafar_jax.backends.xla.packing import pack
from mustafar_jax.backends.xla.products import multiply
from mustafar_jax.backends.xla.prompt import attend_prompt

XLA = Backend(
    name="xla",
    attend_prompt=Operation(attend_prompt),
    attend_dense=Operation(attend_dense),
    attend_packed=Operation(attend_packed),
    pack=Operation(pack),
    multiply=Operation(multiply),
)
