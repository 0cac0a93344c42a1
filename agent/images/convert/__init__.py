"""Images from one format into another: `shoal convert`.

A *source* gives documents (manifests, indexes, configs) and blobs, a *target* takes them (`places`): a registry, an OCI image
layout, or containerd. A *writer* makes the blobs of a format from uncompressed tars (`writers`). `converting` walks the image's
documents, sends each layer through the writer and rewrites what refers to it (`documents`). No agent takes part.
"""
