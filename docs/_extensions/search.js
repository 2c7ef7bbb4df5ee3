/* Included by Sphinx after its searchtools.js (`html_search_scorer`): ranks guides before the reference, and finds numbers. */
var Scorer = {
  // A guide has 5 points for the word in its text, 15 in a heading. A class or function of the reference has 16 for its name, 11 for a part.
  score: ([docname, , , , score]) => (docname.startsWith("api/") ? score - 10 : score),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: {0: 15, 1: 5, 2: -5},
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};

// Sphinx ignores numbers in a query. The index contains those of three digits, such as image sizes (`search_numbers.py`).
const parseWords = Search._parseQuery;
Search._parseQuery = (query) => {
  const parsed = parseWords(query), [, terms, , highlighted] = parsed;
  for (const term of splitQuery(query).filter((word) => /^\d{3}$/.test(word))) {
    terms.add(term);
    highlighted.add(term);
  }
  return parsed;
};
