"""Tokens with a place among them: what the parser reads with."""

from rewards.maths.tokens import Token, Unreadable


class Cursor:
    """Reads tokens from left to right."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.inside = ""
        """The innermost open bracket: in `|` a bar closes, in `{` a bar or a colon begins a condition."""

    @property
    def token(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def next_is(self, *texts: str, ahead: int = 0) -> bool:
        """Whether a sign or command comes next (a word only if it is one of `and`, `or`, `mod`, `U`...)."""
        at = self.at + ahead
        return at < len(self.tokens) and self.tokens[at].kind != "number" and self.tokens[at].text in texts

    def take(self) -> Token:
        token = self.token
        if token is None:
            raise Unreadable("it ends too early")
        self.at += 1
        return token

    def accept(self, *texts: str) -> str | None:
        return self.take().text if self.next_is(*texts) else None

    def expect(self, *texts: str) -> str:
        found = self.accept(*texts)
        if found is None:
            raise Unreadable(f"{self.token.text if self.token else 'the end'!r} where {texts[0]!r} belongs")
        return found
