import tracemalloc

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mustafar_jax.models import Llama, load
from mustafar_jax.models import gguf as gguf_module
from mustafar_jax.models.checkpoint import load_weights
from mustafar_jax.models.config import ModelConfig
from mustafar_jax.models.gguf import open_gguf, read_header
from mustafar_jax.models.rope import RopeScaling
from tests.models.reference import TOLERANCE, forward, random_model, torch_logits

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 40, 64, 96, 2, 4, 2, 16

METADATA = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 50000.0,
}
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    rope_theta=50000.0,
)


def tensor_shapes(tied=False):
    block = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}
    if tied:
        del shapes["output.weight"]
    return shapes | {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in block.items()}


def random_tensors(tied=False):
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in tensor_shapes(tied).items()}


def write(path, metadata=METADATA, tensors=None, kinds=(), architecture="llama"):
    """Write a GGUF file; `kinds` gives the types of the tensors that are not F32, their data given as bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add_value(writer, key, value)
    for name, array in (random_tensors() if tensors is None else tensors).items():
        writer.add_tensor(name, array, raw_dtype=dict(kinds).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer, key, value):
    if key == "general.alignment" and value:
        writer.add_custom_alignment(value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def interleaved(weight, num_heads):
    """GGUF's row order of q and k: what a converter does to Hugging Face's weights, rotary pairs side by side."""
    head_dim = len(weight) // num_heads
    order = [
        h * head_dim + i + half for h in range(num_heads) for i in range(head_dim // 2) for half in (0, head_dim // 2)
    ]
    return weight[order]


# --- configuration ---------------------------------------------------------------------------------------------------


def test_config(tmp_path):
    config, tensors = open_gguf(write(tmp_path / "m.gguf"))
    assert config == CONFIG
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
        **{
            f"model.layers.{i}.{name}.weight": shape
            for i in range(LAYERS)
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
                "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
                "post_attention_layernorm": (HIDDEN,),
                "mlp.gate_proj": (INNER, HIDDEN),
                "mlp.up_proj": (INNER, HIDDEN),
                "mlp.down_proj": (HIDDEN, INNER),
            }.items()
        },
    }


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"llama.attention.sliding_window": 48}, {"sliding_window": 48}),
        ({"llama.attention.sliding_window": 0}, {"sliding_window": None}),
        ({"llama.attention.head_count_kv": [2, 2]}, {"num_kv_heads": 2}),
        ({"llama.attention.head_count_kv": None}, {"num_kv_heads": HEADS}),
        ({"llama.rope.freq_base": None}, {"rope_theta": 10000.0}),
        ({"llama.attention.key_length": 16, "llama.attention.value_length": 16}, {"head_dim": 16}),
        ({"llama.attention.key_length": 32, "llama.rope.dimension_count": 32}, {"head_dim": 32}),
        ({"llama.vocab_size": 39}, {"vocab_size": VOCAB}),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, {"rope_scaling": None}),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, {"rope_scaling": None}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_scaling": RopeScaling("linear", 4.0)},
        ),
        ({"llama.rope.scale_linear": 2.0}, {"rope_scaling": RopeScaling("linear", 2.0)}),
        ({"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9}, {"eos_ids": (7, 9)}),
        ({"tokenizer.ggml.eos_token_id": 2**32 - 1, "tokenizer.ggml.eot_token_id": VOCAB}, {"eos_ids": ()}),
        (
            {
                "tokenizer.ggml.eos_token_id": 2,
                "tokenizer.ggml.tokens": ["a", "<|eot_id|>", "</s>", "<|im_end|>", "<|endoftext|>"],
                "tokenizer.ggml.token_type": [1, 3, 3, 1, 3],
            },
            {"eos_ids": (2, 1, 4)},
        ),
    ],
)
def test_config_fields(tmp_path, changes, fields):
    metadata = {key: value for key, value in {**METADATA, **changes}.items() if value is not None}
    config, _ = open_gguf(write(tmp_path / "m.gguf", metadata))
    assert {name: getattr(config, name) for name in fields} == fields


def test_without_output_the_embeddings_are_tied(tmp_path):
    config, tensors = open_gguf(write(tmp_path / "m.gguf", tensors=random_tensors(tied=True)))
    assert config.tie_word_embeddings
    assert "lm_head.weight" not in tensors


def test_biases(tmp_path):
    bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    extra = {"blk.0.attn_q.bias": interleaved(bias, HEADS), "blk.0.ffn_gate.bias": np.ones(INNER, np.float32)}
    config, tensors = open_gguf(write(tmp_path / "m.gguf", tensors=random_tensors() | extra))
    assert config.attention_bias
    assert config.mlp_bias
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.q_proj.bias"].read(), bias)
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.gate_proj.bias"].read(), 1)


def llama3_divisors(factor, theta=500000.0, head_dim=128, **numbers):
    """What transformers divides the frequencies by: a converter writes these into rope_freqs.weight."""
    numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192} | numbers
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **numbers}
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    return (theta ** -(np.arange(0, head_dim, 2) / head_dim) / scaled.numpy()).astype(np.float32)


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])
def test_llama3_rope_factors(tmp_path, factor, head_dim):
    changes = {
        "llama.rope.freq_base": 500000.0,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
    }
    tensors = random_tensors() | {"rope_freqs.weight": llama3_divisors(factor, head_dim=head_dim)}
    config, opened = open_gguf(write(tmp_path / "m.gguf", METADATA | changes, tensors))
    assert config.rope_scaling == RopeScaling("llama3", factor)
    assert "rope_freqs.weight" not in opened


def test_rope_factors_of_one_are_no_scaling(tmp_path):
    tensors = random_tensors() | {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
    assert open_gguf(write(tmp_path / "m.gguf", tensors=tensors))[0].rope_scaling is None


@pytest.mark.parametrize(
    "factors",
    [
        np.linspace(1, 8, HEAD_DIM // 2),
        np.ones(HEAD_DIM),
        np.full(HEAD_DIM // 2, np.nan),
    ],
)
def test_other_rope_factors_are_refused(tmp_path, factors):
    tensors = random_tensors() | {"rope_freqs.weight": factors.astype(np.float32)}
    with pytest.raises(ValueError, match=r"rope_freqs\.weight.*not those of Llama 3"):
        open_gguf(write(tmp_path / "m.gguf", tensors=tensors))


def test_llama3_factors_of_another_context_are_refused(tmp_path):
    factors = llama3_divisors(8.0, 50000.0, HEAD_DIM, original_max_position_embeddings=4096)
    tensors = random_tensors() | {"rope_freqs.weight": factors}
    with pytest.raises(ValueError, match="not those of Llama 3"):
        open_gguf(write(tmp_path / "m.gguf", tensors=tensors))


def test_two_kinds_of_rope_scaling_are_refused(tmp_path):
    tensors = random_tensors() | {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
    with pytest.raises(ValueError, match=r"linear RoPE scaling and 'rope_freqs\.weight' are both"):
        open_gguf(write(tmp_path / "m.gguf", METADATA | {"llama.rope.scaling.factor": 4.0}, tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.expert_count": 8}, r"llama\.expert_count is 8"),
        ({"split.count": 3}, "is one of 3 parts of a model"),
        ({"llama.rope.dimension_count": 8}, r"llama\.rope\.dimension_count is 8, it must be the head_dim, 16"),
        ({"llama.attention.value_length": 8}, r"llama\.attention\.value_length is 8"),
        ({"llama.attention.head_count": [4, 2]}, r"head_count differs between layers \(\[4, 2\]\)"),
        ({"llama.attention.head_count": 0}, r"head_count is 0"),
        ({"llama.attention.head_count": 4.0}, r"head_count is 4\.0, it must be an integer"),
        ({"llama.attention.head_count_kv": 3}, r"num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"llama.rope.freq_base": "big"}, r"rope\.freq_base is 'big', it must be a number"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type is 'yarn'; supported are"),
        ({"general.alignment": 0}, "general.alignment is 0"),
        ({"llama.attention.causal": False}, r"llama\.attention\.causal is False, supported: True"),
        ({"llama.attention.scale": 0.5}, r"llama\.attention\.scale is 0\.5, supported: 0"),
        ({"llama.logit_scale": 8.0}, r"llama\.logit_scale is 8\.0, supported: 0, 1"),
        ({"llama.rope.scaling.attn_factor": 2.0}, r"llama\.rope\.scaling\.attn_factor is 2\.0, supported: 1"),
        ({"llama.rope.freq_base": 0.0}, r"rope_theta=0\.0 must be a number above 0"),
        ({"llama.rope.scaling.factor": -2.0}, r"factor=-2\.0 must be a number above 0"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, r"rms_norm_eps=nan must be a number of at least 0"),
        ({"llama.context_length": 0}, r"max_position_embeddings=0 must be a positive integer"),
    ],
)
def test_metadata_errors(tmp_path, changes, message):
    path = write(tmp_path / "m.gguf", METADATA | changes)
    with pytest.raises(ValueError, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)


def test_all_missing_metadata_are_named(tmp_path):
    kept = {"llama.attention.head_count": 4, "llama.context_length": 128}
    with pytest.raises(ValueError) as caught:
        open_gguf(write(tmp_path / "m.gguf", kept))
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.layer_norm_rms_epsilon"):
        assert f"llama.{key}" in str(caught.value)
    assert "context_length" not in str(caught.value)


@pytest.mark.parametrize("architecture", ["qwen2moe", "mistral"])
def test_other_architectures_are_refused(tmp_path, architecture):
    with pytest.raises(
        ValueError, match=rf"general\.architecture is '{architecture}'; supported are 'llama', 'qwen2', 'qwen3'"
    ):
        open_gguf(write(tmp_path / "m.gguf", architecture=architecture))


def test_embeddings_are_required(tmp_path):
    tensors = random_tensors()
    del tensors["token_embd.weight"]
    with pytest.raises(ValueError, match=r"'token_embd\.weight' is missing"):
        open_gguf(write(tmp_path / "m.gguf", tensors=tensors))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = random_tensors()
    del tensors["blk.1.ffn_up.weight"]
    tensors["blk.0.attn_q.weight"] = np.zeros((30, HIDDEN), np.float32)
    tensors["blk.0.attn_q_norm.weight"] = np.zeros(HEAD_DIM, np.float32)
    tensors["blk.0.attn_output_norm.weight"] = np.zeros(HIDDEN, np.float32)
    config, opened = open_gguf(write(tmp_path / "m.gguf", tensors=tensors))
    with pytest.raises(ValueError) as caught:
        load_weights(Llama, config, opened, dtype=jnp.float32)
    for name in (
        "1.mlp.up_proj.weight",
        "0.self_attn.q_proj.weight",
        "0.self_attn.q_norm.weight",
        "blk.0.attn_output_norm",
    ):
        assert name in str(caught.value)


# --- weights ---------------------------------------------------------------------------------------------------------


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "tie_word_embeddings": False,
}
# An architecture, transformers' class of it, and what its config says beside SIZES.
FAMILIES = {
    "llama": ("llama", LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("qwen2", Qwen2ForCausalLM, {}),
    "qwen2-tied": ("qwen2", Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3-biased": ("qwen3", Qwen3ForCausalLM, {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
}


def reference_and_weights(family):
    """A random model of transformers, and its weights by name, the embedding once."""
    _, model_class, fields = FAMILIES[family]
    reference = random_model(model_class, model_class.config_class(**SIZES | fields))
    weights = {name: weight.numpy() for name, weight in reference.state_dict().items()}
    if reference.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return reference, weights


def convert(path, family, weights):
    """Write the file that a converter would make of Hugging Face's weights."""
    architecture, _, fields = FAMILIES[family]
    tensors = {gguf_name(name): weight for name, weight in weights.items()}
    metadata = {key.replace("llama", architecture): value for key, value in METADATA.items()}
    if architecture == "llama":
        for name in tensors:
            for part, num_heads in {".attn_q.": HEADS, ".attn_k.": KV_HEADS}.items():
                if part in name:
                    tensors[name] = interleaved(tensors[name], num_heads)
        tensors["rope_freqs.weight"] = llama3_divisors(8.0, 50000.0, HEAD_DIM)
    if "head_dim" in fields:
        metadata |= {f"{architecture}.attention.{part}_length": fields["head_dim"] for part in ("key", "value")}
    return write(path, metadata, tensors, architecture=architecture)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_equal_hugging_faces_and_so_do_logits(tmp_path, family):
    reference, weights = reference_and_weights(family)
    path = convert(tmp_path / "m.gguf", family, weights)
    _, opened = open_gguf(path)
    assert opened.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(opened[name].read(), weight)

    model, _ = load(path, dtype="float32")
    assert type(model).architecture == type(reference).__name__
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, 24))
    np.testing.assert_allclose(forward(model, tokens), torch_logits(reference, tokens), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "part"), [("qwen2", "q_proj.bias"), ("qwen2", "v_proj.bias"), ("qwen3", "k_norm.weight")]
)
def test_what_a_family_always_has_is_missed(tmp_path, family, part):
    _, weights = reference_and_weights(family)
    kept = {name: weight for name, weight in weights.items() if part not in name}
    with pytest.raises(ValueError, match=rf"(?s)missing: model.layers.0.self_attn.{part}, [^,]*{part}$"):
        load(convert(tmp_path / "m.gguf", family, kept))


def test_a_bias_on_the_projection_after_attention_is_known_by_its_tensor(tmp_path):
    _, weights = reference_and_weights("qwen3-biased")
    assert open_gguf(convert(tmp_path / "m.gguf", "qwen3-biased", weights))[0].attention_output_bias
    _, weights = reference_and_weights("qwen2")
    assert not open_gguf(convert(tmp_path / "m.gguf", "qwen2", weights))[0].attention_output_bias


def gguf_name(name):
    for theirs, ours in {
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }.items():
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Kind.F32, jnp.float32), (Kind.F16, jnp.float16), (Kind.BF16, jnp.bfloat16)]
)
def test_plain_types_are_read_as_stored(tmp_path, kind, dtype):
    values = np.random.default_rng(0).normal(size=(VOCAB, HIDDEN)).astype(dtype)
    data = values.view(np.uint8) if kind == Kind.BF16 else values
    tensors = random_tensors() | {"output.weight": data}
    _, opened = open_gguf(write(tmp_path / "m.gguf", tensors=tensors, kinds={"output.weight": kind}))
    read = opened["lm_head.weight"].read()
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values)


# The formats of GGML's blocks, number by number. Every decoder takes one block's bytes and yields its numbers.


def half(block, at):
    return float(block[at : at + 2].view(np.float16)[0])


def decode_q8_0(block):
    return [half(block, 0) * int(q) for q in block[2:].view(np.int8)]


def nibbles(data):
    """All low halves, then all high halves."""
    return [int(byte) & 15 for byte in data] + [int(byte) >> 4 for byte in data]


def bits(data):
    return [int(data[i // 8]) >> (i % 8) & 1 for i in range(8 * len(data))]


def decode_q4_0(block):
    return [half(block, 0) * (q - 8) for q in nibbles(block[2:])]


def decode_q4_1(block):
    return [half(block, 0) * q + half(block, 2) for q in nibbles(block[4:])]


def decode_q5_0(block):
    return [half(block, 0) * (q + 16 * b - 16) for q, b in zip(nibbles(block[6:]), bits(block[2:6]), strict=True)]


def decode_q5_1(block):
    quants = zip(nibbles(block[8:]), bits(block[4:8]), strict=True)
    return [half(block, 0) * (q + 16 * b) + half(block, 2) for q, b in quants]


def scale_and_minimum(packed, j):
    """The 6-bit scale and minimum of sub-block j of 8, packed into 12 bytes."""
    packed = [int(byte) for byte in packed]
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    low = packed[j + 4]
    return low & 15 | packed[j - 4] >> 6 << 4, low >> 4 | packed[j] >> 6 << 4


def decode_q4_k(block, high=None):
    data, numbers = block[-128:], []
    for j in range(8):
        scale, minimum = scale_and_minimum(block[4:16], j)
        for i in range(32):
            quant = int(data[j // 2 * 32 + i]) >> (4 * (j % 2)) & 15
            if high is not None:
                quant += 16 * (int(high[i]) >> j & 1)
            numbers.append(half(block, 0) * scale * quant - half(block, 2) * minimum)
    return numbers


def decode_q5_k(block):
    return decode_q4_k(block, high=block[16:48])


def decode_q6_k(block):
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    numbers = []
    for i in range(256):
        part, quarter, lane = i // 128, i % 128 // 32, i % 32
        nibble = int(low[64 * part + 32 * (quarter % 2) + lane]) >> (4 * (quarter // 2)) & 15
        top = int(high[32 * part + lane]) >> (2 * quarter) & 3
        numbers.append(half(block, 208) * int(scales[i // 16]) * (nibble + 16 * top - 32))
    return numbers


# Kind: numbers in a block, bytes of a block, where its half-precision scales lie, decoder.
BLOCKS = {
    Kind.Q8_0: (32, 34, [0], decode_q8_0),
    Kind.Q4_0: (32, 18, [0], decode_q4_0),
    Kind.Q4_1: (32, 20, [0, 2], decode_q4_1),
    Kind.Q5_0: (32, 22, [0], decode_q5_0),
    Kind.Q5_1: (32, 24, [0, 2], decode_q5_1),
    Kind.Q4_K: (256, 144, [0, 2], decode_q4_k),
    Kind.Q5_K: (256, 176, [0, 2], decode_q5_k),
    Kind.Q6_K: (256, 210, [208], decode_q6_k),
}


@pytest.mark.parametrize("chunk", [1 << 22, 700])
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_quantised_types(tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(gguf_module, "_CHUNK_ELEMENTS", chunk)
    elements, size, scales, decode = BLOCKS[kind]
    rng = np.random.default_rng(kind)
    blocks = rng.integers(0, 256, (5, 512 // elements, size), dtype=np.uint8)
    for at in scales:
        blocks[..., at : at + 2] = rng.normal(size=(*blocks.shape[:2], 1)).astype(np.float16).view(np.uint8)
    tensors = random_tensors() | {"output.weight": blocks.reshape(5, -1)}
    _, opened = open_gguf(write(tmp_path / "m.gguf", tensors=tensors, kinds={"output.weight": kind}))
    expected = np.array([[number for block in row for number in decode(block)] for row in blocks])
    read = opened["lm_head.weight"].read()
    assert read.dtype == np.float32
    assert read.shape == opened["lm_head.weight"].shape == (5, 512)
    np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-6)


def test_supported_types_are_all_tested():
    assert set(gguf_module.SUPPORTED_TYPES) == {Kind.F32, Kind.F16, Kind.BF16, *BLOCKS}


def test_quantised_queries_are_reordered_too(tmp_path):
    weight = np.random.default_rng(0).normal(size=(HEADS * HEAD_DIM, HIDDEN)).astype(np.float32)
    data = gguf.quantize(interleaved(weight, HEADS), Kind.Q8_0)
    tensors = random_tensors() | {"blk.1.attn_q.weight": data}
    _, opened = open_gguf(write(tmp_path / "m.gguf", tensors=tensors, kinds={"blk.1.attn_q.weight": Kind.Q8_0}))
    np.testing.assert_allclose(opened["model.layers.1.self_attn.q_proj.weight"].read(), weight, atol=0.02)


def test_a_read_holds_little_more_than_its_result(tmp_path):
    rows, width = 4096, 1024
    data = np.zeros((rows, width // 32 * 34), np.uint8)
    tensors = random_tensors() | {"token_embd.weight": data}
    path = write(tmp_path / "m.gguf", tensors=tensors, kinds={"token_embd.weight": Kind.Q8_0})
    del data, tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_module, "_CHUNK_ELEMENTS", 1 << 16)
        tracemalloc.start()
        _, opened = open_gguf(path)
        _, peak_of_open = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        size = opened["model.embed_tokens.weight"].read().nbytes
        _, peak_of_read = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_of_open < 1e6
    assert size == rows * width * 4
    assert peak_of_read < 1.2 * size


# --- damage ----------------------------------------------------------------------------------------------------------


def test_unsupported_quantisations_are_all_named(tmp_path):
    tensors, kinds = random_tensors(), {}
    for name, kind, size in (
        ("blk.0.ffn_up.weight", Kind.Q2_K, 84),
        ("blk.1.ffn_up.weight", Kind.IQ4_NL, 18),
        ("output.weight", Kind.F64, 8),
    ):
        tensors[name], kinds[name] = np.zeros((4, size), np.uint8), kind
    path = write(tmp_path / "m.gguf", tensors=tensors, kinds=kinds)
    with pytest.raises(ValueError, match="unsupported quantisations") as caught:
        open_gguf(path)
    for text in (
        "blk.0.ffn_up.weight (Q2_K)",
        "blk.1.ffn_up.weight (IQ4_NL)",
        "output.weight (F64)",
        "Q6_K",
        str(path),
    ):
        assert text in str(caught.value)
    assert "token_embd" not in str(caught.value)


def test_a_type_from_the_future_is_named(tmp_path):
    path = write(tmp_path / "m.gguf")
    entry = b"output.weight" + np.array([2], "<u4").tobytes() + np.array([HIDDEN, VOCAB], "<u8").tobytes()
    data = path.read_bytes()
    assert data.count(entry) == 1
    at = data.index(entry) + len(entry)
    path.write_bytes(data[:at] + np.array([999], "<u4").tobytes() + data[at + 4 :])
    with pytest.raises(ValueError, match=r"output\.weight \(type 999\)"):
        open_gguf(path)


def test_missing_files(tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            open_gguf(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 not a model", "is not a GGUF file"),
        (b"GG", "is cut short: the magic needs bytes 0 to 4, the file has 2"),
        (b"GGUF\x03\x00\x00\x00\x01", "is cut short: the tensor count needs bytes 8 to 16, the file has 9"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), r"of version 1; supported are \(2, 3\)"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "big-endian"),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), r"general\.architecture is None"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_gguf(str(path))
    assert str(path) in str(caught.value)


def test_a_file_cut_short_anywhere_says_so(tmp_path):
    metadata = METADATA | {"tokenizer.ggml.tokens": ["<s>", "é", "b"], "tokenizer.ggml.scores": [0.5, 1.5]}
    path = write(tmp_path / "m.gguf", metadata)
    header = read_header(path)
    start, content = min(t.offset for t in header.tensors.values()), path.read_bytes()
    end = max(t.offset + t.nbytes for t in header.tensors.values())
    cuts = {*range(1, start, 3), *range(start - 40, start + 40), *range(start, end, 997), end - 1}
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        with pytest.raises(
            ValueError, match=rf"m\.gguf' is cut short: .* needs bytes \d+ to \d+, the file has {cut}\b"
        ):
            open_gguf(path)
    path.write_bytes(content[:end])  # what pads the last tensor may be missing
    open_gguf(path)


def test_the_first_incomplete_tensor_is_named(tmp_path):
    path = write(tmp_path / "m.gguf")
    tensor = read_header(path).tensors["blk.1.attn_k.weight"]
    path.write_bytes(path.read_bytes()[: tensor.offset + 5])
    message = rf"'blk\.1\.attn_k\.weight' needs bytes {tensor.offset} to {tensor.offset + 8192}.*\(7 of 21 tensors"
    with pytest.raises(ValueError, match=message):
        open_gguf(path)


def test_a_file_cut_short_after_opening_is_an_error(tmp_path):
    path = write(tmp_path / "m.gguf")
    _, opened = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-20000])
    with pytest.raises(ValueError, match="cut short while it was open"):
        [tensor.read() for tensor in opened.values()]


def test_damaged_bytes_never_raise_anything_but_value_error(tmp_path):
    path = write(tmp_path / "m.gguf", METADATA | {"tokenizer.ggml.tokens": ["<s>", "b"], "x.list": [1, 2]})
    content = np.frombuffer(path.read_bytes(), np.uint8)
    start = min(t.offset for t in read_header(path).tensors.values())
    rng = np.random.default_rng(0)
    raised = 0
    for _ in range(600):
        damaged = content.copy()
        damaged[rng.integers(0, start, rng.integers(1, 4))] = rng.integers(0, 256)
        path.write_bytes(damaged.tobytes())
        try:
            open_gguf(path)
        except ValueError:
            raised += 1
    assert raised > 300


def test_repeated_names_are_refused(tmp_path):
    path = write(tmp_path / "m.gguf")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"))
    with pytest.raises(ValueError, match=r"tensor 'blk\.0\.attn_k\.weight' is there twice"):
        open_gguf(path)
    path.write_bytes(content.replace(b"llama.rope.freq_base", b"general.architecture"))
    with pytest.raises(ValueError, match=r"metadata 'general\.architecture' is there twice"):
        open_gguf(path)


def test_header_equals_the_gguf_packages(tmp_path):
    metadata = {
        **METADATA,
        "tokenizer.ggml.tokens": ["<s>", "é", "日本"],
        "tokenizer.ggml.scores": [0.5, -1.0, 2.0],
        "tokenizer.ggml.add_bos_token": True,
        "general.alignment": 64,
    }
    path = write(tmp_path / "m.gguf", metadata)
    header, reader = read_header(path), gguf.GGUFReader(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert dict(header.metadata) == theirs
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.offset, ours.nbytes, ours.shape) == (tensor.data_offset, tensor.n_bytes, tensor.data.shape)
