"""Reading the indexes of layers in processes of their own. Nothing is imported here: the processes must start fast."""
