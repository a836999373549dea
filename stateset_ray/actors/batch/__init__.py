"""Work on a data set in an actor pool of Ray Data: what one actor does with its rows."""
