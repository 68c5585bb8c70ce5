"""What stacked caches cost a scan over layers."""

import numpy as np

from benchmarks import stacked
from tests.quick import HLO_AS_USERS


def test_stacked_caches_that_are_carried_take_a_layer_of_temporaries():
    sizes = stacked.Sizes(layers=2, capacity=2048)
    query, key, cache = stacked.filled(stacked.CONFIGS["dense"], sizes)
    held, outs = {}, []
    for way in ("unrolled", "carried"):
        step, caches = stacked.compiled_step(way, query, key, cache, sizes.layers, compiler_options=HLO_AS_USERS)
        memory = step.memory_analysis()
        assert memory.alias_size_in_bytes >= sizes.layers * cache.nbytes
        held[way] = memory.temp_size_in_bytes
        outs.append(np.asarray(step(query, key, caches)[0].astype("float32")))
    np.testing.assert_allclose(*outs, atol=0.02)
    assert held["carried"] <= held["unrolled"] + 1.2 * cache.nbytes
