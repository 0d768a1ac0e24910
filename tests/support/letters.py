"""A tokenizer that can be read."""

BOS, EOS = 1, 2


class Letters:
    """A tokenizer with one token a character: a is 10, b is 11, and so on; a blank is 9."""

    def __init__(self, bos: int | None = BOS, eos: int | None = EOS) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos
        self.all_special_ids = [token for token in (bos, eos) if token is not None]

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [9 if letter == " " else 10 + ord(letter) - ord("a") for letter in text]}
