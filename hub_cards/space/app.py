"""The app of a Space: `sssd space RUN --push ORG/NAME` puts the network, images and the page's code beside it."""

from pathlib import Path

from sssd_zoo.hub.page import serve

if __name__ == "__main__":
    serve(Path(__file__).parent)
