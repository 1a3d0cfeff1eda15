"""The cluster side of TimeViper: preprocessing, training, serving and evaluation on Ray."""
