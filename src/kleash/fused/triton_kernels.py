"""The fold over a tile and the gradient of its logits as Triton kernels; imports Triton, so it is imported late.

The symbols are those of `fold` and `backward`: policy logits z with shift m, reference logits w with shift n. Sums
are held in the type of the logits. -inf among the logits is always a forbidden token. Products and sums are fused
only where fma says so: policy and reference, alone or as a pair, are then rounded alike, and a model is exactly 0
away from itself.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950216293335)  # rounded to float32
LOG2_E_REST = tl.constexpr(1.925963033500011e-08)  # what the rounding left out
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fold_kernel(
    logits,
    ref_logits,
    shift,
    total,
    energy,
    cross,
    reaches_forbidden,
    ref_shift,
    ref_total,
    ref_energy,
    ref_cross,
    ref_reaches_forbidden,
    width,
    both_ways: tl.constexpr,
    block: tl.constexpr,
):
    """Fold one row of a tile into the running sums, reading each logit once; program = row.

        total  = sum_v exp(z_v - m)              cross     = sum_v exp(z_v - m) ((z_v - m) - (w_v - n))
        energy = sum_v exp(z_v - m) (z_v - m)    ref_cross = sum_v exp(w_v - n) ((w_v - n) - (z_v - m))

    Each lane of a block keeps sums of its own, which are added up at the end of the row.

    Args:
      logits: [tokens, width] z.
      ref_logits: [tokens, width] w, or None = the policy alone; then ref_* and cross are not touched.
      shift, total, energy, cross, ref_shift, ref_total, ref_cross: [tokens], of the logits' type, updated.
      ref_energy: the same, or None = not wanted.
      reaches_forbidden, ref_reaches_forbidden: [tokens] uint8, updated.
      width: columns of the tile.
      both_ways: also ref_cross, which is not touched otherwise.
      block: columns taken at once.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, block)
    first = lanes == 0
    own_shift = tl.load(shift + row)
    own_total = tl.where(first, tl.load(total + row), 0.0)
    own_energy = tl.where(first, tl.load(energy + row), 0.0)
    if ref_logits is not None:
        own_cross = tl.where(first, tl.load(cross + row), 0.0)
        own_reaches = first & (tl.load(reaches_forbidden + row) != 0)
        other_shift = tl.load(ref_shift + row)
        other_total = tl.where(first, tl.load(ref_total + row), 0.0)
        other_reaches = first & (tl.load(ref_reaches_forbidden + row) != 0)
        if ref_energy is not None:
            other_energy = tl.where(first, tl.load(ref_energy + row), 0.0)
        if both_ways:
            other_cross = tl.where(first, tl.load(ref_cross + row), 0.0)
    for start in range(0, width, block):
        columns = start + lanes
        z = tl.load(logits + row * width + columns, mask=columns < width, other=float("-inf"))
        own_shift, lowered, weights, centred = _lowered(z, own_shift)
        rescale = _exp(lowered)
        if ref_logits is not None:
            w = tl.load(ref_logits + row * width + columns, mask=columns < width, other=float("-inf"))
            other_shift, ref_lowered, ref_weights, ref_centred = _lowered(w, other_shift)
            ref_rescale = _exp(ref_lowered)
            neither = (z != float("-inf")) & (w != float("-inf"))
            difference = tl.where(neither, centred - ref_centred, 0.0)
            moved = lowered - ref_lowered
            own_cross = tl.fma(weights, difference, tl.fma(own_total, moved, own_cross) * rescale)
            own_reaches = own_reaches | ((z != float("-inf")) & (w == float("-inf")))
            if both_ways:
                other_cross = tl.fma(ref_weights, -difference, tl.fma(other_total, -moved, other_cross) * ref_rescale)
            if ref_energy is not None:
                moved_energy = tl.fma(other_total, ref_lowered, other_energy)
                other_energy = tl.fma(ref_weights, ref_centred, moved_energy * ref_rescale)
            other_total = tl.fma(other_total, ref_rescale, ref_weights)
            other_reaches = other_reaches | ((w != float("-inf")) & (z == float("-inf")))
        own_energy = tl.fma(weights, centred, tl.fma(own_total, lowered, own_energy) * rescale)
        own_total = tl.fma(own_total, rescale, weights)
    tl.store(shift + row, own_shift)
    tl.store(total + row, tl.sum(own_total, 0))
    tl.store(energy + row, tl.sum(own_energy, 0))
    if ref_logits is not None:
        tl.store(cross + row, tl.sum(own_cross, 0))
        tl.store(reaches_forbidden + row, tl.max(own_reaches.to(tl.int32), 0).to(tl.uint8))
        tl.store(ref_shift + row, other_shift)
        tl.store(ref_total + row, tl.sum(other_total, 0))
        tl.store(ref_reaches_forbidden + row, tl.max(other_reaches.to(tl.int32), 0).to(tl.uint8))
        if ref_energy is not None:
            tl.store(ref_energy + row, tl.sum(other_energy, 0))
        if both_ways:
            tl.store(ref_cross + row, tl.sum(other_cross, 0))


@triton.jit
def gradient_kernel(
    logits,
    ref_logits,
    places,
    log_normaliser,
    ref_log_normaliser,
    kl,
    entropy,
    of_logprobs,
    of_kl,
    of_entropy,
    of_reverse_kl,
    start,
    width,
    block: tl.constexpr,
):
    """d loss / d logits of one tile, in place over the logits; program = (row, block of columns).

        gradient_v = of_logprobs ([v = y] - pi_v) + of_kl pi_v (log pi_v - log rho_v - KL)
                   - of_entropy pi_v (log pi_v + H) + of_reverse_kl (pi_v - rho_v)

    Args:
      logits: [tokens, width] z, overwritten.
      ref_logits: [tokens, width] w; may be None where neither of_kl nor of_reverse_kl is given.
      places: [tokens] int64, y counted over the whole vocabulary.
      log_normaliser, ref_log_normaliser: [tokens] lse_z, lse_w.
      kl, entropy: [tokens] KL and H, nats.
      of_logprobs, of_kl, of_entropy, of_reverse_kl: [tokens] d loss / d statistic, or None = 0; where of_kl is 0 the
        KL may be infinite.
      start: the tile's first column in the vocabulary.
      width: columns of the tile.
      block: columns of one program.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    z = tl.load(logits + row * width + columns, mask=inside, other=float("-inf"))
    allowed = z != float("-inf")
    logprobs = tl.where(allowed, z - tl.load(log_normaliser + row), 0.0)
    factor = tl.zeros_like(z)
    if of_logprobs is not None:
        factor -= tl.load(of_logprobs + row)
    if of_entropy is not None:
        factor -= tl.load(of_entropy + row) * (logprobs + tl.load(entropy + row))
    if of_reverse_kl is not None:
        factor += tl.load(of_reverse_kl + row)
    if ref_logits is not None:
        w = tl.load(ref_logits + row * width + columns, mask=inside, other=float("-inf"))
    if of_kl is not None:
        upstream = tl.load(of_kl + row)
        difference = tl.where(w != float("-inf"), logprobs - (w - tl.load(ref_log_normaliser + row)), 0.0)
        factor += upstream * (difference - tl.where(upstream == 0.0, 0.0, tl.load(kl + row)))
    gradient = tl.where(allowed, _exp(logprobs), 0.0) * factor
    if of_reverse_kl is not None:
        ref_allowed = w != float("-inf")
        ref_logprobs = tl.where(ref_allowed, w - tl.load(ref_log_normaliser + row), 0.0)
        gradient -= tl.load(of_reverse_kl + row) * tl.where(ref_allowed, _exp(ref_logprobs), 0.0)
    if of_logprobs is not None:
        gradient += tl.where(start + columns == tl.load(places + row), tl.load(of_logprobs + row), 0.0)
    tl.store(logits + row * width + columns, gradient, mask=inside)


@triton.jit
def _lowered(z, shift):
    """(new shift m, old shift - m, exp(z - m), z - m), where a forbidden token has weight and z - m of 0."""
    raised = tl.maximum(shift, tl.max(z, 0))
    allowed = z != float("-inf")
    centred = tl.where(allowed, z - raised, 0.0)
    return raised, shift - raised, tl.where(allowed, _exp(centred), 0.0), centred


@triton.jit
def _exp(x):
    """exp(x) to a few units in the last place, for finite x.

        exp(x) = 2^h (1 + l ln 2),  h + l = x log2(e),  h rounded to float32

    Triton's own exp of a float32 is 2^h alone, off by up to |x| 6e-8 of the value.
    """
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        high = x * LOG2_E
        low = tl.fma(x, LOG2_E_REST, tl.fma(x, LOG2_E, -high))
        power = tl.exp2(high)
        result = tl.fma(power, low * LN_2, power)
    return result
