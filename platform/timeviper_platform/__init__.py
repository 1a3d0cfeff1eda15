"""The cluster side of TimeViper: data, training, serving and evaluation on Ray."""
