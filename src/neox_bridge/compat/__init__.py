"""The known changes of both frameworks as data, what a target expects, diagnosis, the patcher."""
