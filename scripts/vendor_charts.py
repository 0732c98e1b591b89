"""Fetch the chart libraries that travel with the package from the npm registry, and check their digests.

python scripts/vendor_charts.py: writes TradingView's Lightweight Charts (Apache 2.0, market page) and the cartesian part of plotly.js
(MIT, reports) with their licences into cryptoresearch/serving/static.
"""

import base64
import hashlib
import io
import os
import sys
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

REGISTRY = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org/")
STATIC = Path(__file__).resolve().parents[1] / "cryptoresearch" / "serving" / "static"


@dataclass(frozen=True)
class Library:
    "An archive of the registry."

    name: str  # of the npm package
    version: str
    sha512: str  # of the archive, base64
    files: dict[str, str]  # name in static by path in the archive


LIBRARIES = (
    Library(
        "lightweight-charts", "5.2.1", "IVwoK1RLFiLPubaKIjNbtjWLnpPMqiABSrTay6whmNa8L1+19292VtHJ+BWyPUuLCwF0tcQlhEWd1CLB2a1nsQ==",
        {"package/dist/lightweight-charts.standalone.production.js": "lightweight-charts.js", "package/LICENSE": "lightweight-charts.LICENSE"},
    ),
    Library(
        "plotly.js-cartesian-dist-min", "4.1.1", "o8GrFeusncwBIxbBynRJpY4pkgVB6caM+JLpwrLYbbsO7dZ8FJ+SVN2Fr+L7kiG/Z6w4P5O0Jus/Qr5EefHVeg==",
        {"package/plotly-cartesian.min.js": "plotly-cartesian.js", "package/LICENSE": "plotly-cartesian.LICENSE"},
    ),
)  # fmt: skip


def fetch(library: Library) -> bool:  # False where the digest differs; nothing was written then
    "Write the files of a library."
    with urllib.request.urlopen(f"{REGISTRY.rstrip('/')}/{library.name}/-/{library.name}-{library.version}.tgz", timeout=60) as answer:
        archive = answer.read()
    if (found := base64.b64encode(hashlib.sha512(archive).digest()).decode()) != library.sha512:
        print(f"{library.name} has the SHA-512 {found}, not {library.sha512}: nothing was written", file=sys.stderr)
        return False
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        for name, ours in library.files.items():
            member = packed.extractfile(name)
            assert member is not None, name
            (STATIC / ours).write_bytes(member.read())
    print(f"{library.name} {library.version} is in {STATIC}")
    return True


if __name__ == "__main__":
    sys.exit(0 if all([fetch(library) for library in LIBRARIES]) else 1)
