"""The site's worker: runs the apps that the site's administrator has allowed, each behind the sealing mod.

Rules it keeps, whatever the coordinator sends:

1. A bundle runs only if the SHA-256 of its bytes is on the site's list.
2. No bundle may hold a module of an installed package's name: the code that seals is that of the installation.
3. Every message goes through the sealing mod of the installation, whether the app names it or not.
4. What an app raises stays here; the coordinator gets a fixed sentence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from quorsum import bundles, envelope, flower, messages
from quorsum.client.keys import HOME, load_identity
from quorsum.client.mod import seal
from quorsum.errors import Refusal
from quorsum.homes import SITE_HOME

__all__ = ["Worker", "refused"]

log = logging.getLogger("flwr.quorsum.worker")

# Contexts of the last runs; a site takes part in one run at a time.
_RUNS_KEPT = 4


class _AppStopped(Exception):
    """The app tried to end the process."""


class Worker:
    """Runs messages of allowed apps in this process; modules, model and keys stay warm.

    Args:
        home: the site's folder; apps are unpacked under ``apps`` in it.
        allowed: gives the digests that may run, asked for every message so that the list can change.
        node_config: what apps read as their node config; ``quorsum-home`` is always the site's folder.
        minimum_sites: the smallest round the site takes part in.
        share_metrics: names of an app's training metrics that may travel in the clear.
        sealing: the mod around every app, in place of the one that the other arguments describe.
    """

    def __init__(
        self,
        home: Path,
        allowed: Callable[[], Collection[str]],
        node_config: Mapping[str, bundles.Value],
        *,
        minimum_sites: int = 3,
        share_metrics: Sequence[str] = (),
        sealing: Mod | None = None,
    ) -> None:
        self._home = home
        self._allowed = allowed
        self._node_config = {**node_config, HOME: str(home)}
        self._seal = sealing or seal(minimum_sites=minimum_sites, share_metrics=share_metrics)
        self._apps: dict[str, _App] = {}
        self._contexts: dict[tuple[int, Path], Context] = {}

    def handle(self, message: Message, bundle: bytes, run: flower.Run) -> Message:
        """Answer one message.

        Args:
            message: for this site.
            bundle: the bytes the coordinator calls the run's bundle; nothing about them has been checked.
            run: what the coordinator says about the run.

        Returns:
            the reply: the app's, sealed, or a fault with one of the codes ``bundle-not-allowed``,
            ``bundle-unusable``, ``unknown-setting``, or one of the sealing mod's.
        """
        try:
            app = self._app(bundle)
            context = self._context(message, app, run)
        except Refusal as refusal:
            log.warning("%s%s", refusal, self._remedy(refusal, bundle))
            return refused(self._home, message, refusal)
        return self._seal(message, context, app)

    def _remedy(self, refusal: Refusal, bundle: bytes) -> str:
        """What to type here; it names a folder of this site, so that it is for the site's own log."""
        if refusal.code != "bundle-not-allowed":
            return ""
        return f"; if it may run here: {SITE_HOME.command(self._home, 'site', 'allow', bundles.digest(bundle))}"

    def _app(self, bundle: bytes) -> _App:
        digest = bundles.digest(bundle)
        if digest not in self._allowed():
            raise Refusal(
                "bundle-not-allowed",
                f"this site does not allow the bundle {digest}; its administrator can, with: "
                f"quorsum site allow {digest}",
            )
        if digest not in self._apps:
            self._apps[digest] = self._unpacked(bundle, digest)
        return self._apps[digest]

    def _unpacked(self, bundle: bytes, digest: str) -> _App:
        try:
            taken = bundles.shadowed(bundle)
            if taken:
                log.error("bundle %s holds names of installed packages: %s", digest, ", ".join(taken))
                raise Refusal("bundle-unusable", "the bundle holds a name of an installed package; rename it")
            told = bundles.describe(bundle)
            if "clientapp" not in told.components:
                raise Refusal("bundle-unusable", "the bundle has no clientapp")
            folder = self._home / "apps" / digest
            # Anew in every process: what lies there may have been cut short or changed.
            bundles.unpack(bundle, folder)
        except OSError:
            log.exception("cannot unpack bundle %s", digest)
            raise Refusal("bundle-unusable", "this site cannot unpack the bundle; its own log says why") from None
        return _App(folder, told)

    def _context(self, message: Message, app: _App, run: flower.Run) -> Context:
        key = (message.metadata.run_id, app.folder)
        if key not in self._contexts:
            config = bundles.configured(app.told, run.override_config)
            self._contexts[key] = Context(
                key[0], message.metadata.dst_node_id, dict(self._node_config), RecordDict(), config
            )
            for old in list(self._contexts)[:-_RUNS_KEPT]:
                del self._contexts[old]
        return self._contexts[key]


def refused(home: Path, message: Message, refusal: Refusal) -> Message:
    """The reply to a message that is refused before the sealing mod sees it, signed as every reply of this site is.

    Args:
        home: the site's folder.
        message: what is refused.
        refusal: why; the coordinator reads its words.
    """
    content = messages.pack(messages.Fault(code=refusal.code, message=refusal.message))
    try:
        asked = envelope.asked_in(message.content)
        signed = content if asked is None else envelope.sign(content, asked, load_identity(home))
    except Refusal as unsigned:
        log.error("%s", unsigned)
        return Message(content, reply_to=message)
    return Message(signed, reply_to=message)


@dataclass(frozen=True)
class _App:
    """An allowed app, unpacked."""

    folder: Path
    told: bundles.Description

    def __call__(self, message: Message, context: Context) -> Message:
        try:
            # Also when it has been loaded before: its folder must be the one that modules come from.
            app = flower.load_component(self.folder, self.told.components["clientapp"], ClientApp)
            return app(message, context)
        except BaseException as error:
            if isinstance(error, Exception | KeyboardInterrupt):
                raise
            raise _AppStopped(f"the app raised {type(error).__name__}") from error
