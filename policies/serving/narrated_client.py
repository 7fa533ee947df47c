"""A client whose policy also tells what it does, at an interval and over a connection of its own."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from policies.serving.client import PolicyClient
from vla.core.types import ActionChunk, Observation, Prefix
from vla.language.talking import ACCOUNT, CANNOT, Said

_log = logging.getLogger(__name__)


class NarratedClient(PolicyClient):
    """A `PolicyClient`; with `account_s`, a second connection asks the policy every so many seconds what it does. The
    server answers in between the actions of all its clients."""

    def __init__(self, uri: str, *, account_s: float | None = None, **options: Any) -> None:
        """`options` as of `PolicyClient`. ValueError for a server whose policy cannot talk."""
        super().__init__(uri, **options)
        self.account: Said | None = None
        """The account that the policy gave of what it does since the `act` before the last, if any."""
        self._told: Said | None = None
        self._seen: Observation | None = None
        self._asker: PolicyClient | None = None
        if account_s is None:
            return
        if not self.spec.talks:
            self.close()
            raise ValueError(CANNOT)
        self._asker = PolicyClient(uri, **options)
        threading.Thread(target=self._narrate, args=(self._asker, account_s), name="account", daemon=True).start()

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """See `PolicyClient.act`."""
        chunk = super().act(obs, prefix=prefix)
        self._seen, self.account, self._told = obs.select([0]), self._told, None
        return chunk

    def close(self) -> None:
        """Close both connections."""
        if self._asker is not None:
            self._asker.close()
        super().close()

    def _narrate(self, asker: PolicyClient, every_s: float) -> None:
        while not self._closed:
            seen, self._seen = self._seen, None
            if seen is not None:
                try:
                    self._told = asker.answer(seen, [ACCOUNT])[0]
                except (OSError, RuntimeError, ValueError) as problem:
                    if not self._closed:
                        _log.warning("the policy did not say what it does: %s", problem)
            time.sleep(every_s if seen is not None else min(every_s, 0.05))
