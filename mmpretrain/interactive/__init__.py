"""A trained model asked about single images and texts: the functions behind the page of `mmpretrain.demo`, and the page."""
