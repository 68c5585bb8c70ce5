"""Packed rows into a tile in shared memory, an entry at a time: the walk along a bitmap, in its three ways."""

import dataclasses
import functools
import math

from mustafar_jax.layout import WORD
from mustafar_jax.pallas_kernels.mosaic.plan import ROW, Places, Plan
from mustafar_jax.pallas_kernels.mosaic.warp import Register, Warp

Entry = tuple[Register, int]
"""A register, and which half of it (0 low, 1 high) holds 16 bits."""


def scatter(
    w: Warp, words: list[Register], entries: list[Entry], usual: int, seen: Register, at: Places, plan: Plan
) -> None:
    """Store a unit's entries in the tile, one row per lane, of the tokens that are seen.

    The word of pair p and token t stands at byte (32 p + t) * 4 of the tile, so a lane has a bank of its own and no
    two stores meet. There are three ways, of which a unit takes the first that suits all of its rows: rows with their
    entries spread as in most rows; full rows; any rows.

    Args:
        w: the warp.
        words: of the bitmap.
        entries: the slots in order.
        usual: how many of them most rows fill.
        seen: which tokens are.
        at: the warp's places.
        plan: the plan.
    """
    words = [w.select(seen, x, w.integer(0)) for x in words]
    column = at.tile + (at.column << 2)
    # of the words' first channels
    places = [column + (32 * i % plan.pairs * ROW + 32 * i // plan.pairs * 2) for i in range(plan.words)]
    guess = Guess.of(usual, plan.words)
    counts = [w.count_bits(x) for x in words]
    total = functools.reduce(lambda a, b: a + b, counts)
    not_full = total < usual if len(entries) == usual else (total < usual) | (total > usual)

    def as_guessed(_: list[Register]) -> list[Register]:
        scatter_from_both_ends(w, words, places, entries[:usual], guess)
        return []

    def full(_: list[Register]) -> list[Register]:
        scatter_from_both_ends(w, words, places, entries[:usual], None)
        return []

    def any_rows(_: list[Register]) -> list[Register]:
        scatter_upwards(w, words, places, entries, total)
        return []

    def unusual(_: list[Register]) -> list[Register]:
        return w.branch(w.any(not_full), [], any_rows, full)

    w.branch(w.any(not_full | guess.fails(words, counts)), [], unusual, as_guessed)


@dataclasses.dataclass(frozen=True)
class Guess:
    """How a full row's entries are spread over its words, if it is a usual one. Static.

    Attributes:
        least: entries in its first word, and in its last, at least.
        most: the same, at most.
        pair: entries in its first two words together, and in its last two, at least.
    """

    least: int
    most: int
    pair: int

    @staticmethod
    def of(slots: int, words: int) -> "Guess":
        """So that of rows with their entries at random places less than one in a thousand is not so."""

        def spread(n: int) -> tuple[float, float]:
            """Mean and 3.5 standard deviations of the entries in n words."""
            share = n / words
            channels = words * WORD
            variance = slots * share * (1 - share) * (channels - slots) / (channels - 1)
            return slots * share, 3.5 * variance**0.5

        (one, margin), (two, margin_of_two) = spread(1), spread(min(2, words))
        half = slots // 2
        least, most = max(1, math.floor(one - margin)), min(half, math.ceil(one + margin))
        return Guess(min(least, half), most, max(1, math.floor(two - margin_of_two)))

    def fails(self, words: list[Register], counts: list[Register]) -> Register:
        """Whether a full row is not so, or has an empty word, or less than half of its entries in any three words."""
        wrong = [counts[0] < self.least, counts[-1] < self.least]
        if len(words) > 2:
            wrong += [x == 0 for x in words[1:-1]]
            wrong += [counts[0] + counts[1] < self.pair, counts[2] + counts[3] < self.pair]
            wrong += [counts[0] > self.most, counts[-1] > self.most]
        return functools.reduce(lambda a, b: a | b, wrong)


def scatter_from_both_ends(
    w: Warp, words: list[Register], places: list[Register], entries: list[Entry], guess: Guess | None
) -> None:
    """Full rows: half of the entries from channel 0 up, half from the last one down, two chains at a time."""
    slots = len(entries)
    up = Chain([w.reverse_bits(x) for x in words], [x + (WORD - 1) * ROW for x in places], -ROW)
    down = Chain(words[::-1], places[::-1], ROW)
    for chain in (up, down):
        if guess is None:
            chain.skip_empty(w)
        else:
            chain.keep(3)  # half of the entries reach no further
    half = slots // 2
    for taken in range(half):
        for chain, slot in ((up, taken), (down, slots - 1 - taken)):
            w.store_shared_half(chain.take(w), *entries[slot])
            if taken + 1 < half:
                chain.advance(w, taken + 1, guess)


def scatter_upwards(
    w: Warp, words: list[Register], places: list[Register], entries: list[Entry], total: Register
) -> None:
    """Any rows: their entries, `total` of them, in order from channel 0 up."""
    chain = Chain([w.reverse_bits(x) for x in words], [x + (WORD - 1) * ROW for x in places], -ROW)
    chain.skip_empty(w)
    for slot, entry in enumerate(entries):
        w.store_shared_half(chain.take(w), *entry, where=total > slot)
        chain.next_word(w)


class Chain:
    """A walk along a row's entries, the highest bits of the first word first.

    Attributes:
        words: what is left, in order.
        places: in the tile, of each word's bit 0.
        stride: from one bit's place to the next one's.
        taken: the bit that `take` has taken, which the next step clears.
    """

    def __init__(self, words: list[Register], places: list[Register], stride: int) -> None:
        self.words, self.places, self.stride = words, places, stride
        self.taken: Register = None

    def take(self, w: Warp) -> Register:
        """The place of the next entry."""
        self.taken = w.highest_bit(self.words[0])
        return self.places[0] + self.taken * (self.stride % 2**32)

    def keep(self, count: int) -> None:
        """Forget all words but the first ones."""
        self.words, self.places = self.words[:count], self.places[:count]

    def skip_empty(self, w: Warp) -> None:
        """Move empty words behind the others; what stands there then is never taken."""
        for begin in reversed(range(len(self.words) - 1)):
            words, places = w.shift_if_empty([self.words[begin:], self.places[begin:]])
            self.words[begin:], self.places[begin:] = words, places

    def next_word(self, w: Warp, *, among: int | None = None, drop: bool = False) -> None:
        """Clear the entry taken; where the first word is used up, move the others one place ahead.

        Args:
            w: the warp.
            among: how many words move; all if None. The last one of them stays in its place as well.
            drop: leave out the second word.
        """
        chosen = [i for i in range(len(self.words)) if not (drop and i == 1)][:among]
        words, places = w.use_bit([[queue[i] for i in chosen] for queue in (self.words, self.places)], self.taken)
        for i, word, place in zip(chosen, words, places, strict=True):
            self.words[i], self.places[i] = word, place

    def advance(self, w: Warp, taken: int, guess: Guess | None) -> None:
        """Clear the entry taken, go on to the next word where that was the last, as briefly as the guess allows.

        Until `guess.pair` entries are taken the second word lasts; after `guess.most` the first one is behind. Between
        the two, the words' second register is the word to come, whichever that is.
        """
        if guess is None:
            self.next_word(w)
            return
        before_third, past_first = len(self.words) == 2 or taken < guess.pair, taken > guess.most
        if taken < guess.least or (before_third and past_first):
            self.words[0] = w.clear_bit(self.words[0], self.taken)
            return
        if before_third or past_first:
            self.next_word(w, among=2, drop=past_first)
            return
        if taken == guess.pair:
            moved = self.places[0] == self.places[1]
            for queue in (self.words, self.places):
                queue[1] = w.select(moved, queue[2], queue[1])
        self.next_word(w)
