"""For the site: links to files beside `docs/`, which GitHub follows and the site does not hold, become their names."""

import re


def on_page_markdown(markdown: str, **_) -> str:
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2` in the repository)", markdown)
