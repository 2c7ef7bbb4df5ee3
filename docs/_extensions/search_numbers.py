"""Index of the site's search that contains numbers of three digits, such as image sizes; search.js queries it."""

from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish


class EnglishWithNumbers(SearchEnglish):
    """English with numbers of three digits. Sphinx omits all numbers."""

    def word_filter(self, word: str) -> bool:
        """Return whether a word is indexed."""
        return super().word_filter(word) or (len(word) == 3 and word.isdigit())


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_search_language(EnglishWithNumbers)
    return {"parallel_read_safe": True}
