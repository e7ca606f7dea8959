"""The embedded default data: an invented bookshop whose every click has a known cause.

Users with latent tastes and a personal appetite for diversity see lists of books, chosen by popularity and by
a policy that half knows their taste; they look at the upper places more than at the lower ones, and click by
a stated model (`Generator`). Two in a hundred sessions show books at random. Titles are made of words of the
book's genre, topic and publisher, so that text carries the taste too.
"""

from recfast.data.synthetic.config import Config
from recfast.data.synthetic.describe import describe
from recfast.data.synthetic.generator import Generator, bayes
from recfast.data.synthetic.load import load, schema, write_splits
from recfast.data.synthetic.simulation import CAUSES

__all__ = ["CAUSES", "Config", "Generator", "bayes", "describe", "load", "schema", "write_splits"]
