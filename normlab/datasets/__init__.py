"""Where images come from: bundled, downloaded, folders of pictures; decoded ones are cached."""
