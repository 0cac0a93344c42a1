// Package conformance runs containerd's own snapshotter suite against a running Shoal socket.
package conformance

import (
	"context"
	"os"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func TestSnapshotter(t *testing.T) {
	address := os.Getenv("SHOAL_SNAPSHOTTER_SOCKET")
	if address == "" {
		t.Fatal("SHOAL_SNAPSHOTTER_SOCKET is not set: it names the snapshotter's unix socket")
	}
	// The name tells the suite which file system the mounts are: overlayfs renames no directory of a lower layer.
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		connection, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, nil, err
		}
		return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "shoal"), connection.Close, nil
	})
}
