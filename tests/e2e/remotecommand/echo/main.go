// Command echo sends back what each connection says, until that connection says that it is done. It listens where its
// arguments tell it to.
package main

import (
	"io"
	"log"
	"net"
	"os"
)

func main() {
	for _, address := range os.Args[1:] {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			log.Fatal(err)
		}
		go serve(listener)
	}
	select {}
}

func serve(listener net.Listener) {
	for {
		connection, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			defer connection.Close()
			_, _ = io.Copy(connection, connection)
		}()
	}
}
