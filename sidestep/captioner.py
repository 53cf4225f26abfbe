"""Models that write the captions and lyrics of songs that have none. Nobody is asked unless one is chosen.

To add one, write a subclass of :class:`ModelConfig` with its own settings, :meth:`~ModelConfig.identity` and
:meth:`~ModelConfig.answer`, and ``conf/captioner/<name>.yaml``. Which songs are asked about, remembering answers and
marking them is done around it, in ``data.estimates``.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from omegaconf import MISSING

from sidestep.config.schema import option
from sidestep.errors import UserError

log = logging.getLogger(__name__)

ASKED = ("caption", "lyrics")
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP states of a server that may answer if it is asked again."""
REFUSING = (400, 413, 422)
"""HTTP states of a server that does not take this song, and may take others."""
LONGEST_WAIT = 60.0
"""Seconds, whatever a server asks for."""


class NoAnswerError(UserError):
    """There is no answer to be had about this song; others may be asked about."""


@option("captioner", "none")
@dataclass(kw_only=True)
class CaptionerConfig:
    """Nobody is asked."""


@dataclass(kw_only=True)
class ModelConfig(CaptionerConfig):
    """A model that hears a song and answers in words."""

    ask: list[str] = field(default_factory=list)
    """What to ask for, of songs that have none: caption, lyrics."""
    max_seconds: float = 240.0
    """How much of a song is sent, from its beginning, as 16 kHz mono: 2.6 MB of text for a minute."""
    caption_prompt: str = (
        "Describe this music for somebody who is to play something like it: genre, instruments, voice, mood, and how "
        "it was recorded. Answer with one paragraph of plain text, and name no artist and no title."
    )
    """What is asked for a caption."""
    lyrics_prompt: str = (
        "Write down the words that are sung, one line for each line of the song, under headings such as [Verse] and "
        "[Chorus]. Answer with nothing else. If nobody sings, answer [Instrumental]."
    )
    """What is asked for lyrics."""

    def __post_init__(self) -> None:
        if unknown := [key for key in self.ask if key not in ASKED]:
            raise UserError(f"captioner.ask={unknown[0]} must be one of {', '.join(ASKED)}")
        if self.max_seconds < 1:
            raise UserError(f"captioner.max_seconds={self.max_seconds:g} must be at least 1")

    def identity(self) -> str:
        """Who answers; another identity is asked anew."""
        raise NotImplementedError

    def answer(self, prompt: str, wav: bytes) -> str:
        """Answer a question about a song.

        Args:
            prompt: the question.
            wav: the song as a WAV file, 16 kHz, mono, 16 bits.

        Raises:
            NoAnswerError: if there is no answer about this song.
            UserError: if there is no answer to be had, so that no other song needs to be tried.
        """
        raise NotImplementedError


@option("captioner", "openai")
@dataclass(kw_only=True)
class OpenAIConfig(ModelConfig):
    """A server that speaks OpenAI's chat completions and hears audio, on this machine or elsewhere."""

    url: str = MISSING
    """Where it is, up to /v1: http://localhost:8000/v1. Songs are sent there, and nowhere else."""
    model: str = MISSING
    """Name of the model, as the server knows it."""
    key_variable: str = "SIDESTEP_CAPTIONER_KEY"
    """Environment variable that holds the server's key, where it wants one; the key itself is never a setting."""
    timeout_seconds: float = 300.0
    """How long to wait for one answer."""
    retries: int = 4
    """How often to ask again if the server is busy or cannot be reached, after 1, 2, 4, ... seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z_]\w*", self.key_variable, re.ASCII):  # not shown, as it may be the key itself
            raise UserError("captioner.key_variable must be the name of an environment variable, and not the key in it")
        if "@" in self.url or "?" in self.url:
            raise UserError(
                "captioner.url must not hold a password or a key, because it is shown; "
                f"put the key into the environment variable {self.key_variable}"
            )
        try:
            parts = urlsplit(self.url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            parts.path.encode("ascii")
            (parts.hostname or "").encode("idna")
        except ValueError:  # also where an address cannot have such letters
            is_address = False
        if not is_address or not self.url.isprintable() or " " in self.url:
            raise UserError(f"captioner.url={self.url} must be an address such as http://localhost:8000/v1")
        if not self.model.strip():
            raise UserError("captioner.model is empty; type captioner.model=...")
        if self.timeout_seconds <= 0:
            raise UserError(f"captioner.timeout_seconds={self.timeout_seconds:g} must be above 0")
        if not 0 <= self.retries <= 100:
            raise UserError(f"captioner.retries={self.retries} must be from 0 to 100")

    def identity(self) -> str:
        """The model; the same one on another server is not asked anew."""
        return self.model

    def answer(self, prompt: str, wav: bytes) -> str:
        """Ask the server, again while it is busy."""
        content = [
            {"type": "text", "text": prompt},
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav).decode(), "format": "wav"}},
        ]
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": content}]}).encode()
        for attempt in range(self.retries + 1):
            try:
                return self._ask(body)
            except _BusyError as busy:
                if attempt == self.retries:
                    raise UserError(f"{self._place} gave no answer, asked {attempt + 1} times: {busy}") from None
                wait = min(max(2.0**attempt, busy.seconds), LONGEST_WAIT)
                log.info("%s: %s; asking again in %g s", self._place, busy, wait)
                time.sleep(wait)
        raise AssertionError  # the last attempt returns or raises

    @property
    def _place(self) -> str:
        return f"{self.url.rstrip('/')}/chat/completions"

    def _ask(self, body: bytes) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):  # never shown, and Python's own message would show it
            raise UserError(f"the environment variable {self.key_variable} holds more than one line of plain letters")
        try:
            state, said, wait = self._send(body, key)
        except (OSError, http.client.HTTPException) as error:  # no such host, refused, timed out, cut off
            reason = getattr(error, "reason", None) or error
            raise _BusyError(str(reason) or type(error).__name__) from None
        text = " ".join(said[:2_000].decode("utf-8", "replace").split())
        shown = (text.replace(key, f"<{self.key_variable}>") if key else text)[:300]
        if state in PASSING:
            raise _BusyError(f"HTTP {state} {shown}".strip(), wait)
        if state in REFUSING:
            raise NoAnswerError(f"{self._place}: HTTP {state} {shown}".strip())
        if state != 200:
            hint = f"; a key goes into the environment variable {self.key_variable}" if state == 401 and not key else ""
            raise UserError(f"{self._place}: HTTP {state} {shown}".strip() + hint)
        try:
            choice = json.loads(said)["choices"][0]
            content, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{self._place} does not answer as OpenAI's chat completions do: {shown}") from None
        if reason == "length":
            raise NoAnswerError(f"{self._place}: the answer is cut off where the server's limit of tokens is")
        return content.strip() if isinstance(content, str) else ""

    def _send(self, body: bytes, key: str) -> tuple[int, bytes, float]:
        """Send a request; give the HTTP state, what was said, and after how many seconds to ask again."""
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(self._place, body, headers)
        handlers: list[Any] = [_RefuseRedirects]
        if _is_this_machine(urlsplit(self.url).hostname or ""):
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy's own localhost is another machine
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=self.timeout_seconds) as reply:
                return reply.status, reply.read(), 0.0
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(2_000), _seconds(error.headers.get("Retry-After"))


class _BusyError(Exception):
    """The server may answer if it is asked again."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class _RefuseRedirects(urllib.request.HTTPRedirectHandler):
    """A song and a key go where the user said, and nowhere else."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:  # a date
        return 0.0
