"""Tokens as text: what each token of a response adds to it, and what a token says on its own.

A tokenizer decodes sequences, not tokens: some drop the space before the first one, and a character may be spread over
several tokens. So a token is read behind an ordinary one, and what the two say beyond the first is its text.
"""

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what decoding gives for the bytes of a character that is not complete


class Pieces:
    """The texts of a tokenizer's tokens.

    Args:
      tokenizer: special tokens are shown as they are written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        special = set(tokenizer.all_special_ids)
        ordinary = (token for token in sorted(tokenizer.get_vocab().values()) if token not in special)
        self._before = [next((token for token in ordinary if self._decoded([token]).strip().isalnum()), 0)]

    def of_token(self, token: int) -> str:
        """What the token adds behind another one; its own name where that is no whole character."""
        if token not in self._texts:
            text = self._added(self._before, [token])
            self._texts[token] = str(self._tokenizer.convert_ids_to_tokens(token)) if UNFINISHED in text else text
        return self._texts[token]

    def of_response(self, tokens: list[int]) -> list[str]:
        """What each token adds; the pieces together are the response.

        A token that ends within a character adds what is complete: the last token of the character adds it whole.
        """
        pieces: list[str] = []
        known, pending, shown = self._before, list[int](), 0
        for token in tokens:
            pending = [*pending, token]
            text = self._added(known, pending)
            complete = text.rstrip(UNFINISHED)
            pieces.append(complete[shown:])
            shown = len(complete)
            if complete == text:
                known, pending, shown = pending, [], 0
        if pending:
            pieces[-1] += self._added(known, pending)[shown:]
        return pieces

    def _added(self, before: list[int], tokens: list[int]) -> str:
        return self._decoded([*before, *tokens])[len(self._decoded(before)) :]

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
