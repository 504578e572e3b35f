"""The three doors (selector, backbone, dataset) and the nouns in their signatures."""
