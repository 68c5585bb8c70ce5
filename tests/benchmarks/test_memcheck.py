import functools
import sys
from subprocess import run
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import memcheck, memcheck_cases, spills
from benchmarks.cupti import Launch
from mustafar_jax.pallas_kernels.mosaic import lowering
from mustafar_jax.pallas_kernels.triton import language as tl
from tests.helpers import exhaustive
from tests.pallas_kernels.lowering import lower_for_cuda


class Recorder:
    """Sees a launch of a kernel that is given the addresses of arrays, between other words."""

    def __init__(self):
        self.launches = []

    def cubin(self, name):
        return name.encode()

    def see(self, addresses):
        params = [b"\1\0\0\0", *(bytes(8) + address.to_bytes(8, "little") for address in addresses)]
        copy = Launch("copy", (1, 1, 1), (32, 1, 1), 0, params[:2])
        self.launches += [copy, Launch("kernel", (2, 3, 1), (128, 1, 1), 512, params), copy]


class Driver:
    """Memory by number, and a kernel that writes 7 to the last buffer and adds 1 to the one before."""

    def __init__(self):
        self.memory = {}

    def function(self, cubin, name, shared):
        assert (cubin, name, shared) == (b"kernel", "kernel", 512)

    def attribute(self, function, number):
        return number

    def buffer(self, content):
        self.memory[len(self.memory) + 2**40] = content.copy()
        return len(self.memory) - 1 + 2**40

    def read(self, address, nbytes):
        return self.memory[address]

    def free(self, address):
        pass

    def launch(self, function, grid, block, shared, params):
        assert (grid, block, shared) == ([2, 3, 1], [128, 1, 1], 512)
        assert params[0].tobytes() == b"\1\0\0\0"
        assert [int(x[:8].view(np.uint64)[0]) for x in params[1:]] == [0] * (len(params) - 1)
        *_, changed, written = (self.memory[int(x[8:].view(np.uint64)[0])].view(np.uint16) for x in params[1:])
        changed += 1
        written[:] = 7


@pytest.mark.parametrize("right", [True, False])
def test_a_launch_is_repeated(right, tmp_path, monkeypatch):
    recorder = Recorder()
    operands = [jnp.arange(8, dtype=jnp.uint16), jnp.arange(4, dtype=jnp.uint16)]
    wanted = [operands[0] + 1, jnp.full(3, 7 if right else 8, jnp.uint16)]
    ready = jax.block_until_ready

    def see(results):
        recorder.see([x.unsafe_buffer_pointer() for x in (operands[1], *results)])
        return ready(results)

    monkeypatch.setattr(jax, "block_until_ready", see)
    compiler = mock.Mock(lower=lambda *_: mock.Mock(compile=lambda compiler_options: lambda *_: wanted))
    monkeypatch.setattr(jax, "jit", lambda _: compiler)
    # the first result takes the first operand's place, which is therefore not among the parameters
    memcheck_cases.record(recorder, tmp_path / "case", len, operands, {0: 0})
    said, good = memcheck.launch(Driver(), tmp_path / "case.json")
    assert good == right
    assert ("the same results" in said) == right
    assert memcheck.launch_all(Driver(), tmp_path, "ca") == (not right)
    assert memcheck.launch_all(Driver(), tmp_path, "other") == 1


def test_a_launch_without_all_buffers_is_refused():
    launches = [Launch("kernel", (1, 1, 1), (1, 1, 1), 0, [(5).to_bytes(8, "little")])]
    assert memcheck_cases._find(launches, [5], {})[1] == [(0, 0, 0)]
    with pytest.raises(LookupError, match="none of \\['kernel'\\] was given all of 2 buffers"):
        memcheck_cases._find(launches, [5, 6], {})


def test_launching_imports_no_jax():
    program = "import sys, benchmarks.memcheck; sys.exit('jax' in sys.modules)"
    run([sys.executable, "-c", program], check=True)


LOWERED = ["triton, centred, all held", "mosaic, dense keys", "products, 3 query heads", "prune, centred, rescaled"]


@pytest.mark.parametrize("name", [*LOWERED[::4], *exhaustive(*(name for name in LOWERED if name not in LOWERED[::4]))])
def test_cases_are_what_kernels_take(name, monkeypatch):
    pallas_call, kernel_call = tl.pallas_call, lowering.kernel_call
    lowered = []

    def lower(call, operands):
        lowered.append(lower_for_cuda(call, *operands))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(call, *operands))

    def triton_call(kernel, **options):
        return lambda *operands: lower(pallas_call(kernel, **options), operands)

    def mosaic_call(body, *operands, **options):
        return lower(functools.partial(kernel_call, body, **options), operands)

    monkeypatch.setattr(tl, "pallas_call", triton_call)
    monkeypatch.setattr(lowering, "kernel_call", mosaic_call)
    memcheck_cases.CASES[name]()
    assert lowered
    assert all("custom_call" in x for x in lowered)


def test_the_assembler_is_asked_about_what_can_be_lowered():
    call = functools.partial(spills.attend, warps=4, centred=True)
    assert "custom_call" in lower_for_cuda(call, *spills.operands(40, 16))


def test_the_assemblers_log_is_read(monkeypatch, capfd):
    def attend(*_, **__):
        run(["echo", "4 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads, Used 208 registers"], check=True)
        return jnp.zeros(1)

    monkeypatch.setattr(spills, "attend", attend)
    assert spills.measure(40, 1, False, 4) == ["208", "8", "12", "4"]
    assert not capfd.readouterr().out
    monkeypatch.setattr(spills, "attend", lambda *_, **__: jnp.zeros(1))
    assert "no such log" in spills.measure(40, 1, False, 4)[0]
