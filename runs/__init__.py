"""The boundary with the user: command line, recipes, run directories, and the pipeline that fills them."""
