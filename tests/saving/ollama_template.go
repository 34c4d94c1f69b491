// Renders a template with Go's own engine, as Ollama does: {"Template", "System", "Messages", "Tools"} on stdin.
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type text json.RawMessage // JSON that is printed as it came, so that its spaces are those of the chat template

func (t text) String() string { return string(t) }

func (t *text) UnmarshalJSON(data []byte) error { *t = append((*t)[:0], data...); return nil }

type input struct {
	Template, System string
	Messages         []struct {
		Role, Content string
		ToolCalls     []struct {
			Function struct {
				Name      string
				Arguments text
			}
		} `json:"tool_calls"`
	}
	Tools []struct{ Function text }
}

func main() {
	var in input
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Parse(in.Template))
	values := map[string]any{"System": in.System, "Messages": in.Messages, "Tools": in.Tools}
	if err := parsed.Execute(os.Stdout, values); err != nil {
		panic(err)
	}
}
