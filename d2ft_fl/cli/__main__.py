"""``python -m d2ft_fl.cli`` is ``d2ft``, from whichever checkout comes first on the path."""

from d2ft_fl.cli.main import app

app()
