"""Install cryptoresearch: every fact comes from settings.ini, which nbdev reads too."""

import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "scripts"))
from docments import with_sections  # noqa: E402
parser = ConfigParser(delimiters=["="], comment_prefixes=(";",))
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def lines(key: str) -> list[str]:
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]


class BuildDocumented(build_py):
    "Build modules in which `help()` and editors find the comments behind parameters as sections of the docstrings."

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        built, copied = super().build_module(module, module_file, package)
        text = with_sections(Path(module_file).read_text(encoding="utf-8"))
        Path(built).unlink()  # never write through a link into the source
        Path(built).write_text(text, encoding="utf-8")
        return built, copied


# the papermill templates, the dashboards and the tutorials travel inside the package: they are notebooks, not modules
NOTEBOOKS = {f"{cfg['lib_name']}.notebooks.{kind}": f"nbs/{kind}" for kind in ("research", "dashboards", "tutorials")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="MIT",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']},<{cfg['max_python']}",
    packages=[*find_packages(include=[cfg["lib_name"], f"{cfg['lib_name']}.*"]), *NOTEBOOKS],
    package_dir=NOTEBOOKS,
    package_data={name: ["*.ipynb"] for name in NOTEBOOKS} | {cfg["lib_name"]: ["py.typed", "sample/*", "serving/static/*"]},
    install_requires=lines("requirements"),
    extras_require={name: lines(f"{name}_requirements") for name in ("dev", "lab", "mcp", "cluster", "alerts", "mlflow")},
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    cmdclass={"build_py": BuildDocumented},
    zip_safe=False,
)
