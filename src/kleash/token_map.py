"""A response token by token: its text, the exact KL at each position, both models' probabilities and alternatives."""

from typing import Any

from torch import Tensor

from kleash.drift import TokenFigures
from kleash.drift_map import rounded
from kleash.pieces import Pieces
from kleash.reading import Alternatives, Likeliest
from kleash.token_class import TOKEN_CLASSES


def token_maps(
    tokens: TokenFigures, alternatives: Alternatives | None, pieces: Pieces, *, rows: int
) -> list[dict[str, Any]]:
    """One object for each of the first responses, as a page shows it; floats have 6 significant digits.

    pieces:          what each token adds to the text; together they are the response.
    token_ids:       the tokens themselves.
    classes:         the class of each, a name of TOKEN_CLASSES.
    kl_policy_ref:   exact KL(policy || reference) at each position, nats per token.
    policy_logprobs, ref_logprobs: of the token that stands there.
    alternatives:    {"policy": [[piece, logprob], ..], "ref": ..}, likeliest first; null where none were kept.

    Args:
      tokens: of the responses.
      alternatives: of the same responses, or of the first `rows` of them; None = none.
      pieces: of the policy's tokenizer.
      rows: of how many responses.
    """
    return [_token_map(tokens, alternatives, row, pieces) for row in range(rows)]


def _token_map(tokens: TokenFigures, alternatives: Alternatives | None, row: int, pieces: Pieces) -> dict[str, Any]:
    mask = tokens.response_mask[row]
    ids: list[int] = tokens.tokens[row][mask].tolist()
    return {
        "pieces": pieces.of_response(ids),
        "token_ids": ids,
        "classes": [TOKEN_CLASSES[number] for number in tokens.classes[row][mask].tolist()],
        "kl_policy_ref": _rounded_all(tokens.kl_policy_ref[row][mask]),
        "policy_logprobs": _rounded_all(tokens.policy_logprobs[row][mask]),
        "ref_logprobs": _rounded_all(tokens.ref_logprobs[row][mask]),
        "alternatives": [
            None if alternatives is None or not bool(alternatives.kept[row, t]) else _both(alternatives, row, t, pieces)
            for t in range(len(ids))
        ],
    }


def _both(alternatives: Alternatives, row: int, position: int, pieces: Pieces) -> dict[str, list[list[Any]]]:
    def listed(likeliest: Likeliest) -> list[list[Any]]:
        found = zip(likeliest.tokens[row, position].tolist(), likeliest.logprobs[row, position].tolist(), strict=True)
        return [[pieces.of_token(token), rounded(logprob)] for token, logprob in found if rounded(logprob) is not None]

    return {"policy": listed(alternatives.policy), "ref": listed(alternatives.ref)}


def _rounded_all(values: Tensor) -> list[float | None]:
    return [rounded(value) for value in values.tolist()]
