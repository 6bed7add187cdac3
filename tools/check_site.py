"""Open every page of a rendered site in chromium: light and dark, on a phone, a tablet and a desktop.

A page fails if it scrolls sideways, if something in its text covers the table of contents, if a formula is
not typeset, if it stays light for a reader who asks for dark, or if axe-core finds a violation: contrast
below AA, an image without alt text, a link or button without a name. Each fault is one line: page, what,
and where it was seen.

`make site` runs this after `make docs` with Quarto. The pages load nothing from the network: MathJax comes
from a package.
"""

import argparse
import configparser
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Route, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = "chromium", "chromium-browser", "google-chrome"
HOST = "http://site.test"
MODES, WIDTHS = ("light", "dark"), (390, 1024, 1440)
RULES = [  # without scrollable-region-focusable: today's browsers let the keyboard reach such a region
    "aria-valid-attr",
    "button-name",
    "color-contrast",
    "document-title",
    "duplicate-id-aria",
    "html-has-lang",
    "image-alt",
    "label",
    "link-in-text-block",
    "link-name",
    "list",
    "listitem",
    "svg-img-alt",
]
# Folded code and solutions are part of the page.
UNFOLD = '() => document.querySelectorAll("details").forEach(part => { part.open = true })'
TYPESET = """async () => {
  if (window.MathJax?.startup?.promise) await MathJax.startup.promise;
  await document.fonts.ready;
}"""
MEASURE = """mode => {
  const width = document.documentElement.clientWidth, faults = [];
  const named = part => `<${part.localName}> ${part.textContent.trim().replace(/\\s+/g, " ").slice(0, 50)}`;
  const framed = part => {  // it scrolls inside an element of its own
    for (let outer = part.parentElement; outer && outer !== document.body; outer = outer.parentElement)
      if (getComputedStyle(outer).overflowX !== "visible") return true;
    return false;
  };
  const reaching = (selector, edge) => {  // beyond an edge; of nested elements the outermost
    const beyond = [...document.querySelectorAll(selector)].filter(part => {
      const box = part.getBoundingClientRect();
      return box.width && box.right > edge + 1 && !framed(part);
    });
    return beyond.filter(part => !beyond.includes(part.parentElement));
  };
  const wide = reaching("main *, header *, footer *", width);
  for (const part of wide.slice(0, 3)) faults.push(`wider than the page: ${named(part)}`);
  if (!wide.length && document.documentElement.scrollWidth > width + 1) faults.push("scrolls sideways");

  const contents = document.querySelector("#quarto-margin-sidebar, nav[role=doc-toc]");
  const box = contents?.getBoundingClientRect();
  if (box?.width && box.left > width / 2)  // beside the text, not above it
    for (const part of reaching("main *", box.left).slice(0, 3))
      if (!contents.contains(part)) faults.push(`covers the table of contents: ${named(part)}`);

  const formulas = document.querySelectorAll("span.math").length;
  const typeset = document.querySelectorAll("mjx-container").length;
  if (typeset < formulas) faults.push(`${formulas - typeset} of ${formulas} formulas are not typeset`);
  for (const part of document.querySelectorAll("mjx-merror, [data-mjx-error]"))
    faults.push(`formula with an error: ${part.dataset.mjxError || named(part)}`);
  if (document.body.matches(mode === "dark" ? ".quarto-light" : ".quarto-dark"))
    faults.push(`not ${mode}, which the reader asked for`);
  return faults;
}"""


def browser_path() -> str | None:
    "The first chromium of this machine."
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def site_base() -> str:
    "What the absolute links of the site, those of 404.html, begin with: doc_baseurl of settings.ini."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["doc_baseurl"]


def mathjax_folder() -> Path:
    "The files of MathJax 3 in the package `django-static-mathjax`, which needs no Django."
    found = importlib.util.find_spec("mathjax")
    return Path(found.submodule_search_locations[0]) / "static" / "mathjax"


def answer(route: Route, site: Path, base: str) -> None:
    "One request of a page: a file of the site or of MathJax. Everything else is refused."
    address = urlparse(route.request.url)
    path = unquote(address.path)
    if address.netloc == urlparse(HOST).netloc:
        file = site / path.removeprefix(base).lstrip("/")
    elif "/npm/mathjax@3" in path:
        file = mathjax_folder() / path.partition("/npm/mathjax@")[2].partition("/")[2]
    else:
        route.abort()
        return
    if file.is_file():
        route.fulfill(path=file)
    else:
        route.fulfill(status=404)


def violations(page: Page) -> Iterator[str]:
    "What axe-core finds on an open page: each rule once, with its first three places."
    options = {"runOnly": RULES, "resultTypes": ["violations"]}
    for found in Axe().run(page, options=options).response["violations"]:
        for node in found["nodes"][:3]:
            reasons = [item["data"] or {} for item in node["any"]]
            ratio = next((item["contrastRatio"] for item in reasons if "contrastRatio" in item), None)
            of = f", contrast {ratio}" if ratio else ""
            yield f"{found['id']}{of}: {' '.join(node['html'].split())[:90]}"
        if len(found["nodes"]) > 3:
            yield f"{found['id']}: {len(found['nodes'])} places in all"


def page_faults(page: Page, name: str, mode: str, widths: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    "Pairs of a place (`dark 390`) and a fault, for one page of the site in one mode."
    page.set_viewport_size({"width": widths[0], "height": 900})
    page.goto(f"{HOST}/{name}", wait_until="load", timeout=120_000)
    page.evaluate(UNFOLD)
    page.evaluate(TYPESET)
    for width in widths:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(200)  # the layout of Quarto's scripts
        for fault in page.evaluate(MEASURE, mode):
            yield f"{mode} {width}", fault
        if width in (widths[0], widths[-1]):  # between them no element appears
            for fault in violations(page):
                yield f"{mode} {width}", fault


def check(site: Path, names: list[str] | None = None, base: str = "/", verbose: bool = False) -> list[str]:
    "Every fault of the pages `names` (default: all) of a site whose links begin with `base`."
    if not names:
        pages = sorted(site.rglob("*.html"))
        names = [page.relative_to(site).as_posix() for page in pages if "site_libs" not in page.parts]
    views = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        for mode in MODES:
            context = browser.new_context(color_scheme=mode)
            context.route("**/*", lambda route: answer(route, site, base))
            page = context.new_page()
            for name in names:
                if verbose:
                    print(f"{mode:5} {name}", flush=True)
                for place, fault in page_faults(page, name, mode, WIDTHS):
                    if verbose:
                        print(f"      {place}: {fault}", flush=True)
                    views.setdefault(f"{name}: {fault}", []).append(place)
            context.close()
        browser.close()
    return [f"{fault} ({', '.join(where)})" for fault, where in sorted(views.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="folder of the rendered site")
    parser.add_argument("pages", nargs="*", help="pages below it (default: all)")
    args = parser.parse_args()

    if not browser_path():
        sys.exit(f"No browser ({', '.join(BROWSERS)}). On Debian: apt-get install chromium")
    if not (args.site / "index.html").exists():
        sys.exit(f"{args.site} has no index.html: render the site first, with `make docs` and Quarto.")
    if missing := [name for name in args.pages if not (args.site / name).is_file()]:
        parser.error(f"{args.site} has no {missing[0]}: name pages relative to it, such as learn/index.html.")
    faults = check(args.site, args.pages, site_base(), verbose=True)
    if faults:
        sys.exit("\n".join(faults) + f"\n{len(faults)} faults.")
    print("Every page holds at every width, light and dark.")


if __name__ == "__main__":
    main()
