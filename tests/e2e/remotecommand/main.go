// Command remotecommand drives a container runtime's streaming URLs with Kubernetes' own client, for the end-to-end
// tests. What it prints and how it exits is what kubectl would print and exit with.
//
//	remotecommand [-transport spdy|websocket] exec|attach [-stdin] [-tty] [-size COLSxROWS] [-no-stderr] URL
//	remotecommand [-transport spdy|websocket] forward URL LOCAL:REMOTE...
//
// Forwarding prints "ready" and then one line for each local port, and ends when its input does.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"

	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
)

const failed = 250

var config = &rest.Config{TLSClientConfig: rest.TLSClientConfig{Insecure: true}}

func main() {
	transport := flag.String("transport", "spdy", "spdy or websocket")
	flag.Parse()
	verb, arguments := flag.Arg(0), flag.Args()[1:]
	var err error
	switch verb {
	case "exec", "attach":
		err = stream(*transport, arguments)
	case "forward":
		err = forward(*transport, arguments)
	default:
		err = fmt.Errorf("no such verb: %q", verb)
	}
	var exit exec.CodeExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.Code)
	case err != nil:
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(failed)
	}
}

func stream(transport string, arguments []string) error {
	flags := flag.NewFlagSet("stream", flag.ExitOnError)
	stdin := flags.Bool("stdin", false, "pass stdin on")
	tty := flags.Bool("tty", false, "the process has a terminal")
	size := flags.String("size", "", "the terminal's size, such as 80x24")
	noStderr := flags.Bool("no-stderr", false, "leave stderr out")
	_ = flags.Parse(arguments)
	executor, err := newExecutor(transport, flags.Arg(0))
	if err != nil {
		return err
	}
	options := remotecommand.StreamOptions{Stdout: os.Stdout, Tty: *tty}
	if *stdin {
		options.Stdin = os.Stdin
	}
	if !*tty && !*noStderr {
		options.Stderr = os.Stderr
	}
	if *size != "" {
		queue := make(sizes, 1)
		var one remotecommand.TerminalSize
		if _, err := fmt.Sscanf(*size, "%dx%d", &one.Width, &one.Height); err != nil {
			return err
		}
		queue <- one
		options.TerminalSizeQueue = queue
	}
	return executor.StreamWithContext(context.Background(), options)
}

func newExecutor(transport, target string) (remotecommand.Executor, error) {
	parsed, err := url.Parse(target)
	if err != nil {
		return nil, err
	}
	if transport == "websocket" {
		return remotecommand.NewWebSocketExecutor(config, http.MethodGet, parsed.String())
	}
	return remotecommand.NewSPDYExecutor(config, http.MethodPost, parsed)
}

type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, open := <-s
	if !open {
		return nil
	}
	return &size
}

func forward(transport string, arguments []string) error {
	dialer, err := newDialer(transport, arguments[0])
	if err != nil {
		return err
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.NewOnAddresses(
		dialer, []string{"127.0.0.1"}, arguments[1:], stop, ready, io.Discard, os.Stderr)
	if err != nil {
		return err
	}
	go func() {
		<-ready
		ports, _ := forwarder.GetPorts()
		lines := []string{"ready"}
		for _, port := range ports {
			lines = append(lines, fmt.Sprint(port.Local))
		}
		fmt.Println(strings.Join(lines, "\n"))
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(stop)
	}()
	return forwarder.ForwardPorts()
}

func newDialer(transport, target string) (httpstream.Dialer, error) {
	parsed, err := url.Parse(target)
	if err != nil {
		return nil, err
	}
	if transport == "websocket" {
		return portforward.NewSPDYOverWebsocketDialer(parsed, config)
	}
	roundTripper, upgrader, err := spdy.RoundTripperFor(config)
	if err != nil {
		return nil, err
	}
	return spdy.NewDialer(upgrader, &http.Client{Transport: roundTripper}, http.MethodPost, parsed), nil
}
