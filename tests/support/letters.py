"""A tokenizer that can be read."""

from collections.abc import Callable

BOS, EOS = 1, 2


class Letters:
    """A tokenizer with one token a character: a is 10, b is 11, and so on; ^ is BOS, $ is EOS, all others are 9.

    Args:
        bos: its BOS token.
        eos: its EOS token.
        template: writes turns, as a chat template does.
    """

    def __init__(
        self, bos: int | None = BOS, eos: int | None = EOS, template: Callable[[list[dict]], str] | None = None
    ) -> None:
        self.bos_token_id, self.eos_token_id, self.chat_template = bos, eos, template
        self.all_special_ids = [token for token in (bos, eos) if token is not None]
        self.longest = 0

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        self.longest = max(self.longest, len(text))
        special = {"^": BOS, "$": EOS}
        return {"input_ids": [special.get(x, 10 + ord(x) - ord("a") if x.islower() else 9) for x in text]}

    def apply_chat_template(self, turns: list[dict], *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert self.chat_template is not None
        return self.chat_template(turns) + "A" * add_generation_prompt
