// The peer `go`: net/http's MultipartReader, which streams files and fields alike, and
// amqp091-go. PORT and AMQP_* tell it where (see ../destination.py).
//
// It is built without modules, against Debian's package of amqp091-go, by ./dev bench.
package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"mime"
	"net/http"
	"os"

	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	messageBytes = 131064
	window       = 64
	readBytes    = 256 * 1024
)

var errReturned = errors.New("unroutable")

type broker struct {
	connection *amqp.Connection
	exchange   string
	routingKey string
	mandatory  bool
	idle       chan *confirmChannel
}

// A channel in confirm mode, which one upload has to itself, and a buffer for its messages:
// amqp091-go has written a body when Publish returns.
type confirmChannel struct {
	*amqp.Channel
	confirms    chan amqp.Confirmation
	returns     chan amqp.Return
	unconfirmed int
	buffer      []byte
}

func (b *broker) lend() (*confirmChannel, error) {
	select {
	case channel := <-b.idle:
		return channel, nil
	default:
	}
	channel, err := b.connection.Channel()
	if err != nil {
		return nil, err
	}
	if err := channel.Confirm(false); err != nil {
		return nil, err
	}
	// As large as the window, so that the connection's reader never waits for an upload.
	return &confirmChannel{
		Channel:  channel,
		confirms: channel.NotifyPublish(make(chan amqp.Confirmation, window)),
		returns:  channel.NotifyReturn(make(chan amqp.Return, window)),
		buffer:   make([]byte, messageBytes),
	}, nil
}

func (b *broker) giveBack(channel *confirmChannel) {
	select {
	case b.idle <- channel:
	default:
		channel.Close()
	}
}

// Waits until at most so many messages are unconfirmed. A returned message is acked, too, but
// only after it has come back.
func (c *confirmChannel) until(most int) error {
	for c.unconfirmed > most {
		confirm, open := <-c.confirms
		if !open {
			return amqp.ErrClosed
		}
		if !confirm.Ack {
			return errors.New("rejected")
		}
		c.unconfirmed--
	}
	select {
	case <-c.returns:
		return errReturned
	default:
		return nil
	}
}

type upload struct {
	*broker
	channel  *confirmChannel
	context  context.Context
	id       string
	messages int
}

func (u *upload) publishAll(name string, source io.Reader) error {
	for {
		size, err := io.ReadFull(source, u.channel.buffer)
		if size > 0 {
			if err := u.publish(name, u.channel.buffer[:size]); err != nil {
				return err
			}
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (u *upload) publish(name string, body []byte) error {
	if err := u.channel.until(window - 1); err != nil {
		return err
	}
	headers := amqp.Table{"name": name, "piece": int32(u.messages)}
	u.messages++
	u.channel.unconfirmed++
	return u.channel.PublishWithContext(
		u.context, u.exchange, u.routingKey, u.mandatory, false,
		amqp.Publishing{
			DeliveryMode:  amqp.Persistent,
			CorrelationId: u.id,
			Headers:       headers,
			Body:          body,
		},
	)
}

func (u *upload) publishForm(request *http.Request) error {
	// The form's reader asks for 4 KiB at a time, and net/http for no more than that.
	request.Body = &bufferedBody{bufio.NewReaderSize(request.Body, readBytes), request.Body}
	reader, err := request.MultipartReader()
	if err != nil {
		return err
	}
	for {
		part, err := reader.NextPart()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := u.publishAll(part.FormName(), part); err != nil {
			return err
		}
	}
}

type bufferedBody struct {
	io.Reader
	io.Closer
}

func (b *broker) take(request *http.Request) (int, error) {
	channel, err := b.lend()
	if err != nil {
		return 0, err
	}
	u := &upload{broker: b, channel: channel, context: request.Context(), id: newID()}
	kind, _, _ := mime.ParseMediaType(request.Header.Get("Content-Type"))
	if kind == "multipart/form-data" {
		err = u.publishForm(request)
	} else {
		err = u.publishAll("", request.Body)
	}
	if err == nil {
		err = channel.until(0)
	}
	if err != nil {
		channel.Close()
		return 0, err
	}
	b.giveBack(channel)
	return u.messages, nil
}

func (b *broker) ServeHTTP(response http.ResponseWriter, request *http.Request) {
	if request.Method != http.MethodPost {
		answer(response, http.StatusMethodNotAllowed, map[string]string{"error": "POST only"})
		return
	}
	messages, err := b.take(request)
	if err != nil {
		answer(response, http.StatusBadGateway, map[string]string{"error": err.Error()})
		return
	}
	answer(response, http.StatusCreated, map[string]int{"messages": messages})
}

func answer(response http.ResponseWriter, status int, document interface{}) {
	response.Header().Set("Content-Type", "application/json")
	response.WriteHeader(status)
	json.NewEncoder(response).Encode(document)
}

func newID() string {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		log.Fatal(err)
	}
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
}

func main() {
	connection, err := amqp.Dial(os.Getenv("AMQP_URL"))
	if err != nil {
		log.Fatal(err)
	}
	// As many do: without its connection the process ends, and a supervisor starts the next one.
	go func() { log.Fatal(<-connection.NotifyClose(make(chan *amqp.Error, 1))) }()
	handler := &broker{
		connection: connection,
		exchange:   os.Getenv("AMQP_EXCHANGE"),
		routingKey: os.Getenv("AMQP_ROUTING_KEY"),
		mandatory:  os.Getenv("AMQP_MANDATORY") == "true",
		idle:       make(chan *confirmChannel, 256),
	}
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), handler))
}
