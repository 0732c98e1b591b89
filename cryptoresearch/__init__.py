__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cryptoresearch.accessor import register_accessor

if TYPE_CHECKING:
    from cryptoresearch.ingest.files import ingest_frame, process_file
    from cryptoresearch.data.store import connect, init_duckdb
    from cryptoresearch.features.causality import prove_causal
    from cryptoresearch.features.pipeline import DataProcessing
    from cryptoresearch.live.feed import FinnhubWebSocket
    from cryptoresearch.settings import get_settings, Settings

# the names that most programs start with; each module is imported when its name is first used
_WHERE = {
    "init_duckdb": "cryptoresearch.data.store",
    "connect": "cryptoresearch.data.store",
    "process_file": "cryptoresearch.ingest.files",
    "ingest_frame": "cryptoresearch.ingest.files",
    "DataProcessing": "cryptoresearch.features.pipeline",
    "prove_causal": "cryptoresearch.features.causality",
    "FinnhubWebSocket": "cryptoresearch.live.feed",
    "Settings": "cryptoresearch.settings",
    "get_settings": "cryptoresearch.settings",
}
__all__ = [
    "DataProcessing", "FinnhubWebSocket", "Settings", "__version__", "connect", "get_settings", "ingest_frame", "init_duckdb",
    "process_file",
    "prove_causal",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_accessor()  # df.cr, without loading pandas
